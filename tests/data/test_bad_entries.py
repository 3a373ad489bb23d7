"""Whatever an annotation file says, it is refused with file and entry named, or trains."""

import json
import math
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sasa_det.data.check import DataPlace, find_data_problems
from sasa_det.data.entry_problems import find_entry_problems

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
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
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
    (('annotations', 0, 'bbox', [1, 2, math.nan, 4]), 'annotations[0] (id 100): bbox [1, 2, nan, 4]'),
    (('annotations', 0, 'bbox', [1, 2, 3]), 'is not [x, y, width, height] in finite numbers'),
    (('annotations', 0, 'bbox', [0, 0, 10**6, 9]), 'is far larger than its image, 64 x 48 pixels'),
    (('annotations', 1, 'id', 100), '2 entries have this id'),
    (('annotations', 1, 'image_id', 8), 'annotations[1] (id 101): image_id 8 is the id of no image'),
    (('annotations', 1, 'category_id', 1), 'category_id 1 is the id of no category'),
    (('annotations', 1, 'category_id', [30]), 'category_id [30] is the id of no category'),
    (('annotations', 2, 'area', 'big'), "annotations[2] (id 102): area 'big' is no finite number"),
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
    assert [len(sample['data_samples'].gt_instances) for sample in load(files, content)] == [0, 1, 0]


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
    with pytest.raises(ValueError, match='`sasa-det check-data .*instances_train.json FOLDER`') as error:
        load(files, content)
    assert 'lists all 60' in str(error.value)  # each has the others' id, too
    assert len(str(error.value).splitlines()) == 12
