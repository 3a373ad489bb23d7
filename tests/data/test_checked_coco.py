"""What is wrong with COCO-format data is said before training; what is right loads as in mmdet."""

import shutil
import subprocess
import sys
from copy import deepcopy

import pytest
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from sasa_det.data import CheckedCocoDataset
from sasa_det.data.digits import CLASSES

CLASSES_OF_FILES = ('cat', 'dog', 'owl')


def arguments(root, split='train', classes=CLASSES_OF_FILES, **more):
    return dict(
        data_root=str(root),
        ann_file=f'annotations/instances_{split}.json',
        data_prefix=dict(img=f'{split}/'),
        metainfo=dict(classes=classes),
        **more,
    )


def load(coco_files, **more):
    return CheckedCocoDataset(**arguments(coco_files.root, **more))


def assert_loads_alike(**kwargs):
    """Load with mmdet's own class too, compare all, and return ours."""
    checked, own = CheckedCocoDataset(**deepcopy(kwargs)), CocoDataset(**deepcopy(kwargs))
    assert len(checked) == len(own) > 0
    for index in range(len(own)):
        assert checked.get_data_info(index) == own.get_data_info(index)
    assert checked.metainfo == own.metainfo
    assert (checked.cat_ids, checked.cat2label) == (own.cat_ids, own.cat2label)
    assert checked.cat_img_map == own.cat_img_map
    return checked


@pytest.mark.parametrize(
    'more', [dict(), dict(test_mode=True), dict(filter_cfg=dict(filter_empty_gt=True, min_size=32))]
)
def test_loads_as_mmdet_does(coco_files, more):
    dataset = assert_loads_alike(**arguments(coco_files.root, **more))
    assert len(dataset) == (2 if 'filter_cfg' in more else 3)
    # Labels go by the order of the categories in the file, not by their ids.
    (cat, dogs) = dataset.get_data_info(0)['instances']
    assert (cat['bbox'], cat['bbox_label'], cat['ignore_flag']) == ([4, 6, 24, 22], 0, 0)
    assert (dogs['bbox_label'], dogs['ignore_flag']) == (1, 1)


def test_the_digits_load_as_in_mmdet(digits_root):
    for split, count in (('train', 60), ('val', 20)):
        kwargs = arguments(digits_root, split, CLASSES, test_mode=split == 'val')
        assert len(assert_loads_alike(**kwargs)) == count


def test_bccd_loads_as_in_mmdet(shared):
    classes = ('Platelets', 'RBC', 'WBC')
    for split, count in (('train', 292), ('val', 72)):
        kwargs = arguments(shared('bccd'), split, classes, filter_cfg=dict(filter_empty_gt=True))
        assert len(assert_loads_alike(**kwargs)) == count


def test_coco_loads_as_in_mmdet(shared):
    """80 classes with ids from 1 to 90, and crowds; the classes are the default of both."""
    crowds = 0
    for split, count in (('train', 59), ('val', 66)):
        dataset = assert_loads_alike(
            data_root=str(shared('coco_cc')),
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'),
        )
        assert len(dataset) == count
        assert len(dataset.cat_ids) == 80 and dataset.cat2label[90] == 79
        crowds += sum(box['ignore_flag'] for image in dataset for box in image['instances'])
    assert crowds == 14


def test_some_of_the_categories_will_do(coco_files):
    dataset = assert_loads_alike(**arguments(coco_files.root, classes=('cat', 'owl')))
    assert [len(dataset.get_data_info(index)['instances']) for index in range(3)] == [1, 0, 0]


def test_images_in_folders_of_their_own(coco_files):
    (coco_files.root / 'train' / 'deep').mkdir()
    (coco_files.root / 'train' / '7.jpg').rename(coco_files.root / 'train' / 'deep' / '7.jpg')
    with pytest.raises(FileNotFoundError, match="1 of the 3 images .* such as '7.jpg'"):
        load(coco_files)
    coco_files.content['images'][0]['file_name'] = 'deep/7.jpg'
    coco_files.write()
    assert_loads_alike(**arguments(coco_files.root))


def test_a_test_set_without_annotations(coco_files):
    del coco_files.content['annotations']
    coco_files.write()
    dataset = load(coco_files, test_mode=True)
    assert [image['instances'] for image in dataset] == [[], [], []]
    with pytest.raises(ValueError, match='has no image with a box'):
        load(coco_files)


def test_it_is_fetched_by_its_name(coco_files):
    dataset = DATASETS.build(dict(type='CheckedCocoDataset', **arguments(coco_files.root)))
    assert type(dataset) is CheckedCocoDataset


def test_lazy_init_puts_the_check_off(tmp_path):
    dataset = CheckedCocoDataset(**arguments(tmp_path / 'none', lazy_init=True))
    assert dataset.metainfo['classes'] == CLASSES_OF_FILES
    with pytest.raises(FileNotFoundError, match='does not exist'):
        dataset.full_init()


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        CheckedCocoDataset(**arguments(tmp_path / 'none'))
    path = tmp_path / 'none' / 'annotations' / 'instances_train.json'
    for part in (f'annotation file {path} does not exist', 'data_root', 'ann_file'):
        assert part in str(error.value)


@pytest.mark.parametrize(
    'cut',
    [lambda data: data[:-1], lambda data: b'', lambda data: b'\xff' + data, lambda data: b'<'],
)
def test_a_file_that_is_not_json(coco_files, cut):
    path = coco_files.annotations()
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        load(coco_files)
    assert f'annotation file {path} is not JSON: ' in str(error.value)
    assert 'cut short?' in str(error.value)


def without(key):
    return lambda content: content.pop(key)


def without_field(key, place, field):
    return lambda content: content[key][place].pop(field)


def empty(key):
    return lambda content: content[key].clear()


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (without('categories'), "has no list 'categories'; COCO's format is a dict with"),
        (without('images'), "has no list 'images'"),
        (lambda content: content.update(categories={'1': 'cat'}), "has no list 'categories'"),
        (lambda content: content.update(annotations=None), "has no list 'annotations'"),
        (empty('categories'), "has an empty list 'categories'"),
        (empty('images'), "has an empty list 'images'"),
        (without_field('categories', 1, 'name'), "categories[1] lacks 'name'"),
        (without_field('images', 2, 'file_name'), "images[2] lacks 'file_name'"),
        (without_field('images', 0, 'width'), "images[0] lacks 'width'"),
        (without_field('annotations', 1, 'area'), "annotations[1] lacks 'area'"),
        (lambda content: content.update(categories=['cat', 'dog']), 'categories[0] lacks'),
    ],
)
def test_a_file_not_in_cocos_format(coco_files, spoil, message):
    spoil(coco_files.content)
    coco_files.write()
    with pytest.raises(ValueError) as error:
        load(coco_files)
    assert f'annotation file {coco_files.annotations()}' in str(error.value)
    assert message in str(error.value)


def test_a_list_of_results_is_no_annotation_file(coco_files):
    coco_files.annotations().write_text('[{"image_id": 7, "score": 0.5}]')
    with pytest.raises(ValueError, match="holds a list, but COCO's format is a dict"):
        load(coco_files)


def test_names_that_do_not_match(coco_files):
    with pytest.raises(ValueError) as error:
        load(coco_files, classes=('cats', 'dog', 'person'))
    for part in (
        str(coco_files.annotations()),
        "no category 'cats', 'person'",
        "'cats' may be meant to be 'cat'",
        "that the config does not name: 'cat', 'owl'",
        "metainfo=dict(classes=('cat', 'dog', 'owl'))",
        'num_classes=3',
    ):
        assert part in str(error.value)
    assert "'person' may be" not in str(error.value)


def test_the_classes_that_nobody_set(coco_files):
    """Left out of the config, they are COCO's 80, of which the file has two: mmdet goes on."""
    kwargs = arguments(coco_files.root)
    del kwargs['metainfo']
    assert CocoDataset(**kwargs).cat2label == {30: 0, 12: 1}
    with pytest.raises(ValueError, match="no category 'person', 'bicycle'"):
        CheckedCocoDataset(**kwargs)


@pytest.mark.parametrize('classes', [('dog', 'cat', 'owl'), ('cat', 'cat', 'dog'), ('owl', 'cat')])
def test_classes_in_another_order(coco_files, classes):
    """mmdet numbers by the file and names by the config, so that a dog would be shown as a cat."""
    own = CocoDataset(**arguments(coco_files.root, classes=('dog', 'cat', 'owl')))
    assert own.metainfo['classes'][own.cat2label[30]] == 'dog'
    wanted = tuple(name for name in CLASSES_OF_FILES if name in classes)
    with pytest.raises(ValueError) as error:
        load(coco_files, classes=classes)
    assert f'metainfo=dict(classes={wanted})' in str(error.value)
    assert f'num_classes={len(wanted)}' in str(error.value)
    assert str(coco_files.annotations()) in str(error.value)


def test_two_categories_of_one_name(coco_files):
    coco_files.content['categories'][2]['name'] = 'dog'
    coco_files.write()
    with pytest.raises(ValueError, match="more than one category named 'dog'"):
        load(coco_files, classes=('cat', 'dog'))


@pytest.mark.filterwarnings('ignore:.*is not a meta file')
def test_a_string_is_not_taken_for_names(coco_files):
    with pytest.raises(ValueError, match=r"got the string 'cat'.*classes=\('cat',\)"):
        load(coco_files, classes='cat')


def test_images_missing(coco_files):
    for name in ('3.jpg', '5.jpg'):
        (coco_files.root / 'train' / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load(coco_files)
    for part in (
        f'2 of the 3 images of {coco_files.annotations()} are not in {coco_files.root / "train"}',
        "such as '3.jpg', '5.jpg'",
        'data_prefix',
    ):
        assert part in str(error.value)


def test_the_folder_of_images_missing(coco_files):
    kwargs = arguments(coco_files.root)
    kwargs['data_prefix'] = dict(img='pictures/')
    with pytest.raises(
        FileNotFoundError, match=r'3 of the 3 images .*pictures/ \(no such folder\)'
    ):
        CheckedCocoDataset(**kwargs)


def keep(content, *places):
    content['annotations'] = [content['annotations'][place] for place in places]


def test_nothing_to_train_on(coco_files):
    keep(coco_files.content, 1)  # the crowd
    coco_files.write()
    with pytest.raises(ValueError) as error:
        load(coco_files)
    assert str(coco_files.annotations()) in str(error.value)
    assert "no image with a box of the classes 'cat', 'dog', 'owl' to train on" in str(error.value)
    assert len(load(coco_files, test_mode=True)) == 3


def test_nothing_left_by_the_filter(coco_files):
    with pytest.raises(ValueError, match="filter_cfg={'min_size': 100}"):
        load(coco_files, filter_cfg=dict(min_size=100))


def test_no_box_of_the_chosen_class(coco_files):
    with pytest.raises(ValueError, match="no image with a box of the classes 'owl'"):
        load(coco_files, classes=('owl',))


def test_backend_arguments_read_elsewhere(coco_files):
    """Images that another backend fetches need not lie in a folder."""
    for image in (coco_files.root / 'train').iterdir():
        image.unlink()
    dataset = load(coco_files, backend_args=dict(backend='local'))
    assert len(dataset) == 3


TRAIN = """
_base_ = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py'
train_dataloader = dict(dataset=dict(data_root={root!r}))
val_dataloader = dict(dataset=dict(data_root={root!r}))
val_evaluator = dict(ann_file={root!r} + 'annotations/instances_val.json')
"""


def test_mmdets_train_stops_before_training(digits_root, tmp_path):
    """The training split is good; the other one would be met only after the first epochs."""
    root = tmp_path / 'set'
    shutil.copytree(digits_root, root)
    annotations = root / 'annotations' / 'instances_val.json'
    annotations.write_text(annotations.read_text().replace('"nine"', '"neuf"'))
    (tmp_path / 'config.py').write_text(TRAIN.format(root=f'{root}/'))
    command = ['-m', 'sasa_det', 'train', 'config.py', '--work-dir', 'out']
    run = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert run.returncode == 2
    message = run.stderr.split('\nsasa-det train: ')[-1]
    assert message.startswith(f"annotation file {annotations} has no category 'nine', which the ")
    assert run.stderr.count('Traceback') == run.stderr.count('\nValueError: ') == 1
    assert 'Epoch(train)' not in run.stdout + run.stderr
    assert not list(tmp_path.rglob('*.pth'))
