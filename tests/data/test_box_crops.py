"""Crops of boxes: where they are cut, what is left out, what is refused."""

import json

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
            annotations=[dict(image_id=3, **box) for box in boxes],
            categories=[dict(id=2, name='red'), dict(id=7, name='green'), dict(id=9, name='none')],
        )
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    return root


def test_crops_are_squares_around_the_boxes(data, tmp_path):
    out = tmp_path / 'crops'
    assert crop_boxes(data, out, size=32, context=1.0, quiet=True) == dict(train=2, val=2)
    found = sorted(str(path.relative_to(out)) for path in out.rglob('*.jpg'))
    assert found == [f'{s}/{n}.jpg' for s in ('train', 'val') for n in ('green/000008', 'red/000005')]
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
    assert not (tmp_path / 'crops').exists()
    # What an interrupted run leaves behind is in nobody's way.
    assert (tmp_path / 'crops.partial').exists()
    (data / 'val/a.png').write_bytes((data / 'train/a.png').read_bytes())
    assert main([str(data), str(tmp_path / 'crops')]) == 0
    assert capsys.readouterr().out.endswith('train: 2 crops, val: 2 crops\n')
