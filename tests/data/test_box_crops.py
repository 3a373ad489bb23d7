"""Crops of boxes: where they are cut, what is left out, what is refused."""

import json
import os

import cv2
import numpy as np
import pytest

from sasa_det.data.box_crops import crop_boxes, main


@pytest.fixture
def data(tmp_path):
    """Two images; in the first a red square of 20 pixels in the corner, a crowd and a tiny box."""
    root = tmp_path / 'data'
    (root / 'annotations').mkdir(parents=True)
    boxes = [
        dict(id=5, category_id=2, bbox=[0, 0, 20, 10], iscrowd=0),
        dict(id=6, category_id=2, bbox=[0, 0, 40, 40], iscrowd=1),
        dict(id=7, category_id=7, bbox=[30, 30, 20, 7], iscrowd=0),
        dict(id=8, category_id=7, bbox=[30, 20, 10, 16], iscrowd=0),
    ]
    for split in ('train', 'val'):
        (root / split).mkdir()
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:10, :20] = (0, 0, 255)
        pixels[20:36, 30:40] = (0, 255, 0)
        cv2.imwrite(str(root / split / 'a.png'), pixels)
        coco = dict(
            images=[dict(id=3, file_name='a.png', width=64, height=48)],
            annotations=[
                dict(image_id=3, area=box['bbox'][2] * box['bbox'][3], **box) for box in boxes
            ],
            categories=[dict(id=2, name='red'), dict(id=7, name='green'), dict(id=9, name='none')],
        )
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    return root


def test_crops_are_squares_around_the_boxes(data, tmp_path):
    out = tmp_path / 'crops'
    assert crop_boxes(data, out, size=32, context=1.0, quiet=True) == dict(train=2, val=2)
    found = sorted(str(path.relative_to(out)) for path in out.rglob('*.jpg'))
    assert found == [
        f'{s}/{n}.jpg' for s in ('train', 'val') for n in ('green/000008', 'red/000005')
    ]
    assert sorted(path.name for path in (out / 'val').iterdir()) == ['green', 'none', 'red']
    green = cv2.imread(str(out / 'train/green/000008.jpg')).astype(int)
    assert green.shape == (32, 32, 3)
    # 16 pixels wide and high: the box's 10 columns in the middle, black beside them.
    assert green[4:28, 9:23, 1].min() > 200 and green[:, :4].max() < 60 and green[:, 28:].max() < 60
    red = cv2.imread(str(out / 'train/red/000005.jpg')).astype(int)
    # 20 pixels wide and high; the 5 rows above the image repeat its edge.
    assert red[:22, 2:-2, 2].min() > 200 and red[27:].max() < 60


def test_refuses(data, tmp_path, capsys):
    with pytest.raises(ValueError, match='size must be an integer of at least 8, but is 4'):
        crop_boxes(data, tmp_path / 'crops', size=4)
    with pytest.raises(ValueError, match='context must be a number above 0, but is 0'):
        crop_boxes(data, tmp_path / 'crops', context=0)
    with pytest.raises(FileExistsError, match='data is there already'):
        crop_boxes(data, data)
    (data / 'val/a.png').unlink()
    assert main([str(data), str(tmp_path / 'crops')]) == 1
    assert 'a.png is missing or no image' in capsys.readouterr().err
    assert not list(tmp_path.glob('crops*'))
    # What a killed run leaves behind is in nobody's way.
    (tmp_path / 'crops.partial/train/blue').mkdir(parents=True)
    (data / 'val/a.png').write_bytes((data / 'train/a.png').read_bytes())
    assert main([str(data), str(tmp_path / 'crops')]) == 0
    assert capsys.readouterr().out.endswith('train: 2 crops, val: 2 crops\n')
    assert not list(tmp_path.glob('crops*/*/blue')) and not list(tmp_path.glob('*.partial'))


def spoil(data, key, place, **fields):
    path = data / 'annotations' / 'instances_val.json'
    content = json.loads(path.read_text())
    content[key][place].update(fields)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ('key', 'fields', 'said'),
    [
        ('categories', dict(name='/OUTSIDE'), "category '/OUTSIDE' cannot be the name of a folder"),
        ('categories', dict(name='../../OUTSIDE'), "category '../../OUTSIDE' cannot be the name"),
        ('categories', dict(name='..'), "category '..' cannot be the name of a folder"),
        ('categories', dict(name='green/small'), "category 'green/small' cannot be the name"),
        ('categories', dict(name=''), "category '' cannot be the name of a folder"),
        ('categories', dict(name='a\0'), r"category 'a\x00' cannot be the name of a folder"),
        ('categories', dict(name='\ud800'), r"category '\ud800' cannot be the name of a folder"),
        ('categories', dict(name='a' * 256), 'give it a name of at most 255 bytes without a slash'),
        ('categories', dict(name='green'), "more than one category named 'green'"),
        ('annotations', dict(id='../a'), "id '../a' of an annotation is no integer"),
        ('annotations', dict(bbox=None), 'bbox None is not [x, y, width, height]'),
    ],
)
def test_names_that_are_no_folders_are_refused_before_anything_is_written(
    data, tmp_path, capsys, key, fields, said
):
    before = sorted(tmp_path.rglob('*'))
    outside = tmp_path / 'outside'
    name = fields.get('name')
    if name == '/OUTSIDE':
        fields, said = (
            dict(name=str(outside)),
            'cannot be the name of a folder',
        )  # paths are shortened
    spoil(data, key, 0, **fields)
    assert main([str(data), str(tmp_path / 'crops')]) == 1
    error = capsys.readouterr().err
    assert 'instances_val.json' in error and said in error
    assert sorted(tmp_path.rglob('*')) == before


def test_a_named_pipe_in_the_place_of_an_image_is_not_waited_for(data, tmp_path):
    (data / 'val/a.png').unlink()
    os.mkfifo(data / 'val/a.png')
    with pytest.raises(FileNotFoundError, match='val/a.png is missing or no image'):
        crop_boxes(data, tmp_path / 'crops', quiet=True)
