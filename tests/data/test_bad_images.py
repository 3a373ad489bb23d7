"""Images of any kind and size train, or are named and passed over; a test names them and stops."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from sasa_det.cli.main import main
from sasa_det.data import checked_coco
from sasa_det.data.image_problems import find_image_problem

RNG = np.random.default_rng(0)


def pixels(height=48, width=64, channels=3, dtype=np.uint8):
    drawn = RNG.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype=dtype)
    return drawn[..., 0] if channels == 1 else drawn


def as_bytes(image, kind='png'):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def jpeg():
    return as_bytes(Image.fromarray(pixels()), 'jpeg')


GOOD = {
    'rgb': lambda: jpeg(),
    'grey': lambda: as_bytes(Image.fromarray(pixels(channels=1))),
    '16-bit grey': lambda: as_bytes(Image.fromarray(pixels(channels=1, dtype=np.uint16))),
    '16-bit': lambda: cv2.imencode('.png', pixels(dtype=np.uint16))[1].tobytes(),
    'RGBA': lambda: as_bytes(Image.fromarray(pixels(channels=4))),
    'CMYK': lambda: as_bytes(Image.fromarray(pixels(channels=4), 'CMYK'), 'jpeg'),
    'palette': lambda: as_bytes(Image.fromarray(pixels()).quantize(16)),
    'black and white': lambda: as_bytes(Image.fromarray(pixels(channels=1)).convert('1')),
}
BAD = {
    'empty': (lambda: b'', 'is empty'),
    'text': (lambda: b'no image', 'is no image'),
    'half a JPEG': (lambda: jpeg()[: len(jpeg()) // 2], 'is damaged or cut short'),
    'a header alone': (lambda: jpeg()[:30], 'is '),
    'half a PNG': (lambda: as_bytes(Image.fromarray(pixels()))[:2000], 'is damaged or cut short'),
    '1 x 5000': (
        lambda: as_bytes(Image.fromarray(pixels(5000, 1))),
        'is 1 x 5000 pixels, too thin',
    ),
    '5000 x 1': (
        lambda: as_bytes(Image.fromarray(pixels(1, 5000))),
        'is 5000 x 1 pixels, too thin',
    ),
}


@pytest.mark.parametrize('kind', GOOD)
def test_each_kind_trains(coco_files, kind):
    path = coco_files.root / 'train' / '7.jpg'
    path.write_bytes(GOOD[kind]())
    assert find_image_problem(path, (64, 48)) is None
    sample = coco_files.dataset()[0]
    assert sample['inputs'].shape == (3, 24, 32)
    assert str(sample['inputs'].dtype) == 'torch.uint8'
    assert sample['data_samples'].img_path == str(path)
    assert len(sample['data_samples'].gt_instances) == 1


def test_one_pixel_trains(coco_files):
    path = coco_files.root / 'train' / '7.jpg'
    path.write_bytes(as_bytes(Image.fromarray(pixels(1, 1))))
    assert find_image_problem(path) is None
    sample = coco_files.dataset()[0]
    assert sample['inputs'].shape == (3, 32, 32)
    assert 'is 1 x 1 pixels, but the annotations say 64 x 48' in find_image_problem(path, (64, 48))


@pytest.mark.parametrize('kind', BAD)
def test_each_bad_one_is_named_and_loses_no_run(coco_files, kind, monkeypatch):
    logged = []
    monkeypatch.setattr(checked_coco, 'print_log', lambda text, **_: logged.append(text))
    path = coco_files.root / 'train' / '7.jpg'
    make, said = BAD[kind]
    path.write_bytes(make())
    assert said in find_image_problem(path)
    sample = coco_files.dataset()[
        0
    ]  # OpenCV fills up half a JPEG with grey; of the others, one next to it
    taken = sample['data_samples'].img_path
    assert taken != str(path) or kind.startswith(('half', 'a header'))
    if taken == str(path):
        return
    (text,) = set(logged)  # it may be drawn again
    assert f'Passed over: image {path} of {coco_files.annotations()} {said}' in text
    with pytest.raises(ValueError, match=f'image {path} of .*instances_train.json ') as error:
        coco_files.dataset(test_mode=True)[0]
    assert said in str(error.value)


def test_a_transform_that_fails_otherwise_is_not_hidden(coco_files):
    dataset = coco_files.dataset()
    dataset.pipeline.transforms.append(lambda results: results['no such key'])
    with pytest.raises(KeyError, match='no such key'):
        dataset[0]


class TestCheckData:
    CONFIG = """
data = dict(
    type='RepeatDataset',
    times=2,
    dataset=dict(
        type='CheckedCocoDataset',
        data_root={root!r},
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=('cat', 'dog', 'fox')),
    ),
)
model = dict(type='RetinaNet')
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
"""

    def test_good_data(self, coco_files, capsys):
        argv = ['check-data', str(coco_files.annotations()), str(coco_files.root / 'train')]
        assert main(argv) == 0
        assert capsys.readouterr().out == f'0 problems in {coco_files.annotations()}\n'

    def test_a_configs_data(self, coco_files, tmp_path, capsys):
        (coco_files.root / 'train' / '7.jpg').write_bytes(BAD['half a JPEG'][0]())
        coco_files.content['annotations'][0]['bbox'] = None
        coco_files.write()
        (tmp_path / 'config.py').write_text(self.CONFIG.format(root=f'{coco_files.root}/'))
        assert main(['check-data', str(tmp_path / 'config.py')]) == 1
        said = capsys.readouterr().out
        assert "has no category 'fox', which the config names as a class" in said
        assert 'annotations[0] (id 100): bbox None is not' in said
        assert f'{coco_files.root}/train/7.jpg is damaged or cut short' in said
        assert said.endswith(f'3 problems in {coco_files.annotations()}\n')

    def test_annotations_without_a_folder(self, coco_files, capsys):
        assert main(['check-data', str(coco_files.annotations())]) == 2
        assert 'name the folder of its images after it' in capsys.readouterr().err


@pytest.mark.parametrize('orientation', [6, 3])
def test_annotations_of_the_stored_orientation_are_told(tmp_path, orientation):
    """OpenCV rotates such an image, and training would see its boxes elsewhere."""
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / 'a.jpg', exif=exif)
    stored, read = (30, 20), (20, 30) if orientation == 6 else (30, 20)
    assert find_image_problem(tmp_path / 'a.jpg', read) is None
    problem = find_image_problem(tmp_path / 'a.jpg', stored)
    assert (problem is None) == (stored == read)
    if problem:
        assert problem.startswith('is rotated to 20 x 30 pixels when it is read, by its EXIF')
