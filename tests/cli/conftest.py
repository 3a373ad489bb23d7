"""A folder as training leaves it, with a tiny detector of random weights, and some images."""

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

CONFIG = """
_base_ = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py'
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[32, 64, 128, 256]))
"""


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The checkpoint; its config lies beside it."""
    folder = tmp_path_factory.mktemp('trained')
    config = folder / 'tiny.py'
    config.write_text(CONFIG)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    read = Config.fromfile(config)
    model = MODELS.build(read.model)
    model.init_weights()
    read.dump(config)
    meta = dict(dataset_meta=dict(classes=read.metainfo.classes), cfg=read.pretty_text)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'epoch_1.pth')
    return folder / 'epoch_1.pth'


@pytest.fixture
def images(tmp_path):
    """A folder with three images of different sizes, one below it, and a text file."""
    folder = tmp_path / 'images'
    rng = np.random.default_rng(0)
    for name, size in {'a.png': (64, 96), 'b.jpg': (80, 50), 'deeper/a.png': (50, 50)}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    (folder / 'notes.txt').write_text('not an image')
    return folder
