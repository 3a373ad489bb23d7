"""A tiny detector of random weights, and a page that explores it."""

import logging

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.logging import MMLogger

from sasa_det.visualization.explorer.session import Explorer

CONFIG = """
_base_ = 'sasa_det::quickstart/retinanet_sasa-tiny_digits.py'
model = dict(
    backbone=dict(base_channels=8), neck=dict(in_channels=[32, 64, 128, 256]),
    test_cfg=dict(score_thr=0.0, max_per_img=5))
"""


@pytest.fixture(scope='session')
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(CONFIG)
    config = Config.fromfile(path)
    torch.manual_seed(0)
    model = init_detector(config, palette='random', device='cpu')
    model.dataset_meta = dict(classes=config.metainfo.classes)
    return model


@pytest.fixture(scope='session')
def explorer(model):
    return Explorer(model, score_thr=0.0)


@pytest.fixture(scope='session')
def image():
    """(H, W, 3) = (120, 180, 3)."""
    return np.random.default_rng(0).integers(0, 256, (120, 180, 3), dtype=np.uint8)


@pytest.fixture
def image_file(image, tmp_path):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), image)
    return path


@pytest.fixture(scope='session')
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp('examples')
    paths = []
    for number in range(3):
        pixels = np.full((96, 96, 3), 40 * number, np.uint8)
        pixels[20:50, 30:60] = 255
        paths.append(folder / f'example_{number}.png')
        cv2.imwrite(str(paths[-1]), pixels)
    return paths


@pytest.fixture(scope='session')
def url(explorer, examples):
    """Address of a page that runs in this process."""
    pytest.importorskip('gradio', reason='the explorer\'s page needs gradio: the extra "demo"')
    from sasa_det.visualization.explorer.page import build_page, serve

    # The server shuts all log handlers that there are, also mmengine's, which then can no longer be used.
    for logger in MMLogger._instance_dict.values():
        for handler in [each for each in logger.handlers if isinstance(each, logging.FileHandler)]:
            logger.removeHandler(handler)
    page = build_page(explorer, examples, 'epoch_<b>1</b>.pth')
    yield serve(page, '127.0.0.1', None, block=False)
    page.close(verbose=False)
