"""Whatever an annotation file says, it is refused with file and entry named, or trains."""

import json
import math
import os
import socket
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sasa_det.cli.main import main
from sasa_det.data import checked_coco
from sasa_det.data.check import DataPlace, Doubt, data_places, find_data_problems
from sasa_det.data.entry_problems import check_entries, describe_corners, find_entry_problems

CLASSES = ('cat', 'dog', 'owl')
few = settings(max_examples=25, deadline=None, derandomize=True)


def load(files, content):
    """Load content as training does, and give each sample."""
    path = files.annotations()
    # As Python reads and writes it: JSON itself knows neither NaN nor Infinity.
    path.write_text(json.dumps(content))
    dataset = files.dataset()
    return [dataset[index] for index in range(len(dataset))]


def assert_named_or_trains(files, content):
    """The promise."""
    try:
        samples = load(files, content)
    except (ValueError, FileNotFoundError) as error:
        assert str(files.annotations()) in str(error)
        return str(error)
    for sample in samples:
        boxes = sample['data_samples'].gt_instances
        height, width = sample['inputs'].shape[1:]
        numbers = boxes.bboxes.tensor.numpy()
        assert np.isfinite(numbers).all()
        assert (numbers >= 0).all() and (numbers <= [width, height, width, height]).all()
        assert all(0 <= label < len(CLASSES) for label in boxes.labels)
    return ''


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([7, 30, 100, 10**400, 1e300, -1, 0, '', '7.jpg', math.nan]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
fields = st.sampled_from(
    [('images', place, key) for place in range(3) for key in ('id', 'file_name', 'width', 'height')]
    + [('categories', place, key) for place in range(3) for key in ('id', 'name')]
    + [
        ('annotations', place, key)
        for place in range(3)
        for key in ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd')
    ]
)


@few
@given(spoilt=st.lists(st.tuples(fields, anything), min_size=1, max_size=3))
def test_any_value_in_any_field(files, spoilt):
    content = deepcopy(files.content)
    for (key, place, field), value in spoilt:
        content[key][place][field] = value
    assert_named_or_trains(files, content)


numbers = st.floats(width=64) | st.integers(-200, 200)


@few
@given(box=st.lists(numbers, min_size=4, max_size=4), area=numbers)
@example(box=[0, 0, 1e30, 5], area=1)
@example(box=[math.nan, 0, 5, 5], area=25)
@example(box=[63.5, 0, 1, 1], area=1)
def test_any_box(files, box, area):
    content = deepcopy(files.content)
    content['annotations'][2].update(bbox=box, area=area)
    said = assert_named_or_trains(files, content)
    if not all(math.isfinite(number) for number in [*box, area]):
        assert 'annotations[2] (id 102)' in said


@few
@given(content=anything | st.fixed_dictionaries({}, optional=dict(
    images=st.lists(anything, max_size=2),
    categories=st.lists(anything, max_size=2),
    annotations=st.lists(anything, max_size=2),
)))  # fmt: skip
def test_any_file(files, content):
    assert assert_named_or_trains(files, content)


ENTRIES = [
    (
        ('annotations', 0, 'bbox', [1, 2, math.nan, 4]),
        'annotations[0] (id 100): bbox [1, 2, nan, 4]',
    ),
    (('annotations', 0, 'bbox', [1, 2, 3]), 'is not [x, y, width, height] in finite numbers'),
    (('annotations', 0, 'bbox', [0, 0, 10**6, 9]), 'is far larger than its image, 64 x 48 pixels'),
    (('annotations', 1, 'id', 100), '2 entries have this id'),
    (
        ('annotations', 1, 'image_id', 8),
        'annotations[1] (id 101): image_id 8 is the id of no image',
    ),
    (('annotations', 1, 'category_id', 1), 'category_id 1 is the id of no category'),
    (('annotations', 1, 'category_id', [30]), 'category_id [30] is the id of no category'),
    (('annotations', 2, 'area', 'big'), "annotations[2] (id 102): area 'big' is no finite number"),
    (('annotations', 0, 'iscrowd', '0'), "annotations[0] (id 100): iscrowd '0' is neither 0 nor 1"),
    (('annotations', 0, 'iscrowd', 2), 'annotations[0] (id 100): iscrowd 2 is neither 0 nor 1'),
    (('annotations', 0, 'iscrowd', [0]), 'annotations[0] (id 100): iscrowd [0] is neither 0 nor 1'),
    (('images', 0, 'id', 3), 'images[0] (id 3): 2 entries have this id'),
    (('images', 0, 'width', 0), 'images[0] (id 7): width 0 is no number of pixels'),
    (('images', 0, 'file_name', 3), 'images[0] (id 7): file_name 3 is no text'),
    (('categories', 0, 'id', 21), 'categories[0] (id 21): 2 entries have this id'),
    (('categories', 1, 'name', None), 'categories[1] (id 12): name None is no text'),
]


@pytest.mark.parametrize(('change', 'said'), ENTRIES)
def test_refused_with_the_entry(files, change, said):
    content = deepcopy(files.content)
    key, place, field, value = change
    content[key][place][field] = value
    with pytest.raises(ValueError, match='has wrong entries') as error:
        load(files, content)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ('box', 'said'), [([3, 3, 0, 9], 'has no pixel'), ([70, 3, 5, 9], 'lies outside of its image')]
)
def test_what_mmdet_leaves_out_is_said_but_trains(files, box, said):
    content = deepcopy(files.content)
    content['annotations'][0]['bbox'] = box
    (problem,) = find_entry_problems(content)
    assert said in str(problem) and str(problem).endswith('(it is left out)')
    assert [len(sample['data_samples'].gt_instances) for sample in load(files, content)] == [
        0,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ('place', 'said'),
    [
        (
            ('annotations', 2, 0),
            'annotations[2] (id 0): in a set that is tested, its id must be a number',
        ),
        (
            ('annotations', 2, 'c'),
            "annotations[2] (id 'c'): in a set that is tested, its id must be a ",
        ),
        (
            ('images', 2, '5'),
            'images: in a set that is tested, their ids must be all numbers or all',
        ),
        (
            ('categories', 2, 'owl'),
            'categories: in a set that is tested, their ids must be all numbers',
        ),
    ],
)
def test_ids_that_pycocotools_miscounts_train_but_are_not_tested_on(coco_files, place, said):
    """A box that is matched with annotation 0 is a false one there; the other ids end an evaluation."""
    key, index, value = place
    coco_files.content[key][index]['id'] = value
    coco_files.write()
    assert len(coco_files.dataset()) == 3
    with pytest.raises(ValueError) as raised:
        coco_files.dataset(test_mode=True)
    assert said in str(raised.value)

    dataset = dict(
        ann_file=str(coco_files.annotations()), data_prefix=dict(img=str(coco_files.root / 'train'))
    )
    for name, kinds in (('train_dataloader', []), ('val_dataloader', [str])):
        (found,) = data_places({name: dict(dataset=dataset)})
        assert [type(problem) for problem in find_data_problems(found)] == kinds
    (doubt,) = find_data_problems(found._replace(tested=None))
    assert isinstance(doubt, Doubt) and said in doubt


def test_all_of_them_at_once(coco_files):
    data = coco_files
    for (key, place, field, value), _ in ENTRIES[:1] + ENTRIES[4:6]:
        data.content[key][place][field] = value
    data.write()
    (data.root / 'train' / '5.jpg').write_bytes(b'')
    (data.root / 'train' / '3.jpg').unlink()
    found = list(find_data_problems(DataPlace(str(data.annotations()), str(data.root / 'train'))))
    assert [line.partition(': ')[2] for line in found[:3]] == [
        'annotations[0] (id 100): bbox [1, 2, nan, 4] is not [x, y, width, height] in finite numbers',
        'annotations[1] (id 101): image_id 8 is the id of no image',
        'annotations[1] (id 101): category_id 1 is the id of no category',
    ]
    assert found[3:] == [
        f'{data.root}/train/3.jpg does not exist',
        f'{data.root}/train/5.jpg is empty',
    ]


def test_ten_are_shown_and_all_are_counted(files):
    content = deepcopy(files.content)
    content['annotations'] = [{**content['annotations'][0], 'image_id': 8}] * 30
    with pytest.raises(
        ValueError, match='`sasa-det check-data .*instances_train.json FOLDER`'
    ) as error:
        load(files, content)
    assert 'lists all 60' in str(error.value)  # each has the others' id, too
    assert len(str(error.value).splitlines()) == 12


@pytest.mark.parametrize('crowd', [0, 1, True, False])
def test_crowds_of_each_legal_kind_are_taken(files, crowd):
    content = deepcopy(files.content)
    content['annotations'][0]['iscrowd'] = crowd
    check_entries('a.json', content)
    del content['annotations'][0]['iscrowd']
    check_entries('a.json', content)


def corners(content, *, of_corners):
    """Give the boxes as corners, with the areas of the corners or the product of the last two numbers."""
    content = deepcopy(content)
    for entry in content['annotations']:
        x, y, width, height = entry['bbox']
        entry['bbox'] = [x, y, x + width, y + height]
        entry['area'] = width * height if of_corners else (x + width) * (y + height)
    return content


def test_corners_are_told_by_their_areas_or_by_the_edges(files):
    said = "boxes {} corners [x1, y1, x2, y2]; COCO's boxes are [x, y, width, height]"
    told = describe_corners(corners(files.content, of_corners=True))
    assert told == '3 of 3 ' + said.format('have the area of')
    told = describe_corners(corners(files.content, of_corners=False))
    assert told == '1 of 3 ' + said.format('reach beyond their image, and all could be')


def test_boxes_that_are_right_are_not_taken_for_corners(files):
    assert describe_corners(files.content) is None
    content = deepcopy(files.content)
    rng = np.random.default_rng(0)
    shape = content['annotations'][0]
    content['annotations'] = []
    for number in range(2000):
        x, y = rng.integers(0, 50), rng.integers(0, 40)
        width, height = rng.integers(1, 66 - x), rng.integers(1, 50 - y)  # some reach beyond by two
        area = width * height * rng.uniform(0.3, 1)  # of a mask
        box = [int(value) for value in (x, y, width, height)]
        content['annotations'].append({**shape, 'id': number, 'bbox': box, 'area': area})
    assert describe_corners(content) is None
    # One object that fills each image.
    content['annotations'] = [{**shape, 'bbox': [0, 0, 64, 48], 'area': 64 * 48}]
    assert describe_corners(content) is None


@few
@given(entry=st.fixed_dictionaries(dict(image_id=anything, bbox=anything, area=anything)))
def test_no_value_makes_the_search_for_corners_fail(files, entry):
    content = deepcopy(files.content)
    content['annotations'][1].update(entry)
    content['images'][0]['width'] = content['images'][2]['id'] = entry['area']
    assert describe_corners(content) is None or 'corners' in describe_corners(content)


def test_corners_are_a_warning_and_train(coco_files, capsys, monkeypatch):
    logged = []
    monkeypatch.setattr(checked_coco, 'print_log', lambda text, **_: logged.append(text))
    coco_files.content = corners(coco_files.content, of_corners=True)
    coco_files.write()
    place = DataPlace(str(coco_files.annotations()), str(coco_files.root / 'train'))
    (doubt,) = find_data_problems(place)
    assert isinstance(doubt, Doubt) and '3 of 3 boxes have the area of corners' in doubt
    assert main(['check-data', *place[:2]]) == 0
    assert capsys.readouterr().out == (
        f'warning: {doubt}\n0 problems in {coco_files.annotations()}\n'
    )
    coco_files.dataset()
    assert logged == [f'annotation file {doubt}']


def test_names_do_not_reach_the_terminal_as_commands(coco_files, capsys):
    coco_files.content['images'][0]['file_name'] = 'a\x1b[2J\n\ud800.jpg'
    coco_files.write()
    argv = ['check-data', str(coco_files.annotations()), str(coco_files.root / 'train')]
    assert main(argv) == 1
    assert 'a\\x1b[2J\\n\\ud800.jpg does not exist\n' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['pipe', 'link to a pipe', 'socket', 'folder'])
def test_what_is_no_file_is_named_and_not_waited_for(coco_files, kind, tmp_path, monkeypatch):
    def replace(path):
        path.unlink()
        if kind == 'pipe':
            os.mkfifo(path)
        elif kind == 'link to a pipe':
            os.mkfifo(tmp_path / path.stem)
            path.symlink_to(tmp_path / path.stem)
        elif kind == 'socket':
            listening = socket.socket(socket.AF_UNIX)
            with monkeypatch.context() as patch:  # the address of a socket is at most 107 bytes
                patch.chdir(path.parent)
                listening.bind(path.name)
            listening.close()
        else:
            path.mkdir()

    path = coco_files.root / 'train' / '3.jpg'
    place = DataPlace(str(coco_files.annotations()), str(path.parent))
    replace(path)
    assert list(find_data_problems(place)) == [f'{path} is no regular file']
    with pytest.raises(ValueError, match=f'image {path} of .*train.json is no regular file'):
        coco_files.dataset()
    replace(coco_files.annotations())
    (said,) = find_data_problems(place)
    assert said.startswith(f'annotation file {coco_files.annotations()} is no regular file; ')
    with pytest.raises(FileNotFoundError, match='is no regular file'):
        coco_files.dataset()
