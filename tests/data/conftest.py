"""Data sets: the embedded digits, a small one of one's own, and real ones."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize

from sasa_det.data import CheckedCocoDataset
from sasa_det.data.digits import make_digits
from tests.outside import outside, why_not


@pytest.fixture(scope='session')
def shared():
    """Give the folder of real data sets called for, or skip with the reason."""

    def find(name):
        if not outside(name).is_dir():
            pytest.skip(why_not(name))
        return outside(name)

    return find


@pytest.fixture(scope='session')
def digits_root(tmp_path_factory):
    """Sixty training and twenty validation images of digits; to be read only."""
    return make_digits(tmp_path_factory.mktemp('digits') / 'set', num_train=60, num_val=20)


class CocoFiles:
    """A data set of three images and three classes, to be spoilt.

    The ids are sparse and in no order. The first image has a cat and a crowd of dogs, the second a
    dog, the third nothing.
    """

    def __init__(self, root):
        self.root = root
        boxes = [
            (7, 30, [4, 6, 20, 16], 0),
            (7, 12, [30, 4, 25, 30], 1),
            (3, 12, [8, 8, 40, 20], 0),
        ]
        self.content = dict(
            images=[
                dict(id=index, file_name=f'{index}.jpg', width=64, height=48) for index in (7, 3, 5)
            ],
            annotations=[
                dict(
                    id=index + 100,
                    image_id=image,
                    category_id=category,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=crowd,
                )
                for index, (image, category, box, crowd) in enumerate(boxes)
            ],
            categories=[
                dict(id=30, name='cat'),
                dict(id=12, name='dog'),
                dict(id=21, name='owl'),
            ],
        )
        rng = np.random.default_rng(0)
        for split in ('train', 'val'):
            (root / split).mkdir(parents=True)
            for image in self.content['images']:
                pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                assert cv2.imwrite(str(root / split / image['file_name']), pixels)
            self.write(split)

    def annotations(self, split='train'):
        """Path of a split's annotation file."""
        return self.root / 'annotations' / f'instances_{split}.json'

    def write(self, split='train'):
        """Write a split's annotation file as `content` is now."""
        self.annotations(split).parent.mkdir(exist_ok=True)
        self.annotations(split).write_text(json.dumps(self.content), encoding='utf-8')

    def dataset(self, **more):
        """The training split, loaded as for training."""
        return CheckedCocoDataset(
            data_root=str(self.root),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
            metainfo=dict(classes=('cat', 'dog', 'owl')),
            pipeline=[
                dict(type=LoadImageFromFile),
                dict(type=LoadAnnotations, with_bbox=True),
                dict(type=Resize, scale=(32, 32), keep_ratio=True),
                dict(type=PackDetInputs),
            ],
            **more,
        )


@pytest.fixture
def coco_files(tmp_path):
    """A small data set, the same in both splits."""
    return CocoFiles(tmp_path / 'data')


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """The same for all tests, of which the training annotations alone are written over."""
    return CocoFiles(tmp_path_factory.mktemp('coco') / 'data')
