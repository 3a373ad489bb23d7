"""The digits on photographs: what is drawn is what is annotated, and half a set is no set."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from sklearn.datasets import load_digits, load_sample_images

from sasa_det.data import digits
from sasa_det.data.digits import CLASSES, SPLITS, find_fault, main, make_digits

SMALL = dict(num_train=10, num_val=10, image_size=64, quiet=True)
SIZE = 192


def contents(root):
    """Every file of a folder with its bytes."""
    files = (path for path in root.rglob('*') if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def annotated(digits_root):
    """The annotation file of each split."""
    return {
        split: json.loads((digits_root / f'annotations/instances_{split}.json').read_text())
        for split in SPLITS
    }


@pytest.fixture
def small(tmp_path):
    """A whole set that a test may spoil."""
    return make_digits(tmp_path / 'digits', **SMALL)


def test_the_same_bytes_twice_and_others_from_another_seed(tmp_path):
    first = contents(make_digits(tmp_path / 'a', **SMALL))
    assert len(first) == 10 + 10 + 2 + 2  # images, annotations, manifest and marker
    assert contents(make_digits(tmp_path / 'b', **SMALL)) == first
    other = contents(make_digits(tmp_path / 'c', seed=1, **SMALL))
    assert other.keys() == first.keys()
    assert other['train/000001.jpg'] != first['train/000001.jpg']


def test_a_shorter_set_begins_as_a_longer_one(tmp_path, small):
    """An image is drawn from its own numbers alone, but for which are empty or crowded."""
    longer = make_digits(tmp_path / 'longer', **{**SMALL, 'num_train': 12})
    same = [
        name
        for name, data in contents(small).items()
        if name.startswith('train/') and contents(longer)[name] == data
    ]
    assert len(same) >= 6
    assert contents(longer)['val/000001.jpg'] == contents(small)['val/000001.jpg']


def test_splits_share_no_digit(annotated):
    drawn = {
        split: {index for entry in content['annotations'] for index in entry['digit_ids']}
        for split, content in annotated.items()
    }
    assert drawn['train'] and drawn['val']
    assert not drawn['train'] & drawn['val']
    targets = load_digits().target
    for content in annotated.values():
        for entry in content['annotations']:
            assert all(targets[index] + 1 == entry['category_id'] for index in entry['digit_ids'])


def test_splits_share_no_part_of_a_photograph(annotated):
    for name in ('china.jpg', 'flower.jpg'):
        seen = {}
        for split, content in annotated.items():
            seen[split] = np.zeros((427, 640), bool)
            for image in content['images']:
                if image['photograph'] == name:
                    x, y, width, height = image['crop']
                    assert 0 <= x and 0 <= y and x + width <= 640 and y + height <= 427
                    seen[split][y : y + height, x : x + width] = True
            assert seen[split].any()
        assert not (seen['train'] & seen['val']).any()


@pytest.mark.parametrize('split', SPLITS)
def test_small_medium_and_large_boxes_crowds_and_empty_images(annotated, split):
    content = annotated[split]
    singles = [entry for entry in content['annotations'] if not entry['iscrowd']]
    sides = np.sqrt([entry['area'] for entry in singles])
    # COCO's borders of small, medium and large.
    counts = np.histogram(sides, [0, 32, 96, SIZE])[0]
    assert counts.sum() == len(singles)
    assert (counts >= 0.05 * len(singles)).all(), counts
    assert {entry['category_id'] for entry in singles} == set(range(1, 11))
    assert any(entry['iscrowd'] for entry in content['annotations'])
    filled = {entry['image_id'] for entry in content['annotations']}
    assert 0 < len(content['images']) - len(filled) < 0.1 * len(content['images'])


def redrawn(image, photographs):
    """The background of an image as its entry tells it, before its brightness was turned down."""
    x, y, width, height = image['crop']
    crop = photographs[image['photograph']][y : y + height, x : x + width]
    crop = np.ascontiguousarray(crop[:, ::-1] if image['flip'] else crop)
    return cv2.resize(crop, (SIZE, SIZE)).astype(float)


def apart(a, b, least=6):
    """Whether there are this many pixels between two boxes."""
    return any(
        a[axis] + a[axis + 2] + least <= b[axis] or b[axis] + b[axis + 2] + least <= a[axis]
        for axis in (0, 1)
    )


@pytest.mark.parametrize('split', SPLITS)
def test_boxes_are_tight_around_the_ink(digits_root, annotated, split):
    """Ink is what differs from the photograph: its bounds are the box, and no ink is elsewhere."""
    loaded = load_sample_images()
    photographs = {Path(name).name: image for name, image in zip(loaded.filenames, loaded.images)}
    annotations = {}
    for entry in annotated[split]['annotations']:
        annotations.setdefault(entry['image_id'], []).append(entry)
    offs = []
    for image in annotated[split]['images']:
        entries = annotations.get(image['id'], [])
        pixels = cv2.imread(str(digits_root / split / image['file_name']))[..., ::-1].astype(float)
        background = redrawn(image, photographs)
        free = np.ones((SIZE, SIZE), bool)
        for x, y, width, height in (entry['bbox'] for entry in entries):
            # JPEG's blocks of 8 pixels carry some of the ink over the box's border.
            free[max(y - 8, 0) : y + height + 8, max(x - 8, 0) : x + width + 8] = False
        brightness = (pixels * background)[free].sum() / (background**2)[free].sum()
        assert 0.3 < brightness < 0.75
        change = np.abs(pixels - brightness * background).max(-1)
        assert np.quantile(change[free], 0.999) < 40

        for entry in entries:
            others = [other['bbox'] for other in entries if other is not entry]
            if entry['iscrowd'] or not all(apart(entry['bbox'], other) for other in others):
                continue
            x, y, width, height = entry['bbox']
            left, top = max(x - 5, 0), max(y - 5, 0)
            ink = change[top : y + height + 5, left : x + width + 5] > 40
            rows, columns = np.flatnonzero(ink.any(1)) + top, np.flatnonzero(ink.any(0)) + left
            bounds = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            off = bounds - [x, y, x + width, y + height]
            # The edge of ink is soft, in proportion to its size.
            assert np.abs(off).max() <= 2 + 0.03 * max(width, height), (image, entry, bounds)
            offs.append(off)
    assert len(offs) > len(annotated[split]['images']) / 2
    # On the whole no side is off, and by no more than a soft edge explains.
    assert np.abs(np.mean(offs, axis=0)).max() < 1


@pytest.mark.parametrize('split', SPLITS)
def test_pycocotools_reads_it(digits_root, annotated, split, capsys):
    coco = COCO(digits_root / f'annotations/instances_{split}.json')
    assert [coco.cats[index + 1]['name'] for index in range(10)] == list(CLASSES)
    assert len(coco.imgs) == len(list((digits_root / split).iterdir()))
    assert len(coco.anns) == len(annotated[split]['annotations'])
    for image in coco.imgs.values():
        pixels = cv2.imread(str(digits_root / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3) == (SIZE, SIZE, 3)
    for entry in coco.anns.values():
        x, y, width, height = entry['bbox']
        assert 0 <= x < x + width <= SIZE and 0 <= y < y + height <= SIZE
        if not entry['iscrowd']:
            assert entry['area'] == width * height
            continue
        mask = coco.annToMask(entry)
        assert mask.sum() == entry['area']
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1] == entry['bbox']


def test_a_whole_set_is_left_alone(small, capsys):
    before = {path: path.stat().st_mtime_ns for path in small.rglob('*')}
    assert make_digits(small, **{**SMALL, 'quiet': False}) == small
    assert 'already in' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in small.rglob('*')} == before


def lose_image(root):
    (root / 'val' / '000003.jpg').unlink()


def cut_image(root):
    path = root / 'train' / '000002.jpg'
    path.write_bytes(path.read_bytes()[:-1])


def add_image(root):
    (root / 'train' / '000099.jpg').write_bytes((root / 'train' / '000001.jpg').read_bytes())


def change_annotations(root):
    path = root / 'annotations' / 'instances_train.json'
    path.write_text(path.read_text().replace('"zero"', '"none"'))


def lose_annotations(root):
    (root / 'annotations' / 'instances_val.json').unlink()


def lose_manifest(root):
    (root / 'manifest.json').unlink()


def cut_manifest(root):
    path = root / 'manifest.json'
    path.write_text(path.read_text()[:-20])


def age_manifest(root):
    path = root / 'manifest.json'
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, 'format': manifest['format'] - 1}))


@pytest.mark.parametrize(
    ('spoil', 'fault'),
    [
        (lose_image, 'lost or changed'),
        (cut_image, 'lost or changed'),
        (add_image, 'lost or changed'),
        (change_annotations, 'lost or changed'),
        (lose_annotations, 'files were lost'),
        (lose_manifest, 'not finished'),
        (cut_manifest, 'not finished'),
        (age_manifest, 'another version'),
    ],
)
def test_a_half_made_or_changed_set_is_made_anew(small, spoil, fault, capsys):
    whole = contents(small)
    assert find_fault(small) is None
    spoil(small)
    assert fault in find_fault(small)
    make_digits(small, **{**SMALL, 'quiet': False})
    assert 'made anew' in capsys.readouterr().out
    assert contents(small) == whole
    assert find_fault(small) is None


def test_another_size_is_made_anew(small):
    parameters = dict(num_train=10, num_val=11, image_size=64, seed=0)
    assert find_fault(small, parameters) == 'it has num_val 10 instead of 11'
    make_digits(small, **{**SMALL, 'num_val': 11})
    assert len(list((small / 'val').iterdir())) == 11


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError('No space left on device')])
def test_an_exception_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error):
    drawn = []

    def draw(*args):
        drawn.append(args)
        if len(drawn) == 15:
            raise error
        return []

    monkeypatch.setattr(digits, '_draw_objects', draw)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        make_digits(tmp_path / 'digits', **SMALL)
    assert len(drawn) == 15
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_middle_keeps_the_set_that_was_there(small, monkeypatch):
    before = contents(small)

    def draw(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, '_draw_objects', draw)
    with pytest.raises(KeyboardInterrupt):
        make_digits(small, seed=1, **SMALL)
    assert contents(small) == before
    assert [path.name for path in small.parent.iterdir()] == [small.name]


# The module alone, without torch and mmdet, which take seconds to import.
RUN_UNTIL_KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location('digits', sys.argv[1])
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)
draw, drawn = digits._draw_objects, []
def draw_some(*args):
    drawn.append(1)
    if len(drawn) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*args)
digits._draw_objects = draw_some
digits.make_digits(sys.argv[2], num_train=10, num_val=10, image_size=64, quiet=True)
"""


def test_a_killed_run_is_taken_for_nothing_and_cleared_away(tmp_path, small, capsys):
    root = tmp_path / 'other'
    command = [sys.executable, '-c', RUN_UNTIL_KILLED, digits.__file__, str(root)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert not root.exists()
    partial = tmp_path / 'other.partial'
    assert len(list((partial / 'train').iterdir())) == 10  # it was killed in the second split
    assert 'not finished' in find_fault(partial)

    make_digits(root, **{**SMALL, 'quiet': False})
    assert 'left by an interrupted run' in capsys.readouterr().out
    assert contents(root) == contents(small)
    assert not partial.exists()


def test_two_processes_do_not_make_one_set(tmp_path):
    partial = tmp_path / 'digits.partial'
    partial.mkdir()
    marker = partial / digits._MARKER
    marker.touch()
    holder = digits._lock(marker)
    try:
        with pytest.raises(RuntimeError, match='another process is making a data set in'):
            make_digits(tmp_path / 'digits', **SMALL)
        assert marker.exists()
    finally:
        holder.close()
    assert find_fault(make_digits(tmp_path / 'digits', **SMALL)) is None


@pytest.mark.parametrize('place', ['digits', 'digits.partial'])
def test_a_folder_of_somebody_else_is_refused(tmp_path, place):
    """Same names as ours, but without the marker."""
    (tmp_path / place / 'train').mkdir(parents=True)
    (tmp_path / place / 'train' / 'holiday.jpg').write_bytes(b'dear')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r'not a digits data set made here \(train\)'):
        make_digits(tmp_path / 'digits', **SMALL)
    assert contents(tmp_path) == before


def test_something_of_somebody_else_in_a_set_of_ours_is_refused(small):
    (small / 'notes.txt').write_text('dear')
    lose_image(small)
    with pytest.raises(FileExistsError, match='notes.txt'):
        make_digits(small, **SMALL)
    assert (small / 'notes.txt').read_text() == 'dear'


def test_a_file_is_refused_and_an_empty_folder_taken(tmp_path):
    (tmp_path / 'file').write_text('dear')
    with pytest.raises(FileExistsError, match='is a file'):
        make_digits(tmp_path / 'file', **SMALL)
    (tmp_path / 'empty').mkdir()
    assert find_fault(make_digits(tmp_path / 'empty', **SMALL)) is None


@pytest.mark.parametrize(
    ('name', 'value'),
    [('num_train', 9), ('num_val', 0), ('image_size', 63), ('seed', -1), ('num_train', 10.0)],
)
def test_numbers_out_of_range(tmp_path, name, value):
    with pytest.raises(ValueError, match=f'{name} must be an integer of at least .*got {value}'):
        make_digits(tmp_path / 'digits', **{**SMALL, name: value})
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys, small):
    arguments = ['--num-train', '10', '--num-val', '10', '--image-size', '64']
    assert main([str(tmp_path / 'made'), *arguments]) == 0
    assert '10 training and 10 validation images of 64 x 64 pixels' in capsys.readouterr().out
    assert contents(tmp_path / 'made') == contents(small)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    for arguments, message in (
        ([tmp_path, '--num-val', 3], 'num_val must be an integer of at least 10, got 3'),
        ([os.devnull], f'{os.devnull} is a file; give a folder for the digits data set'),
        ([f'{os.devnull}/digits'], 'Not a directory'),
    ):
        assert main([str(argument) for argument in arguments]) == 1
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count('\n') == 1
        assert printed.out == ''
