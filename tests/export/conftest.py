import cv2
import numpy as np
import pytest
import torch
from small_detectors import build


@pytest.fixture(scope='module')
def detector():
    detector = build('retina')
    detector.dataset_meta = dict(classes=('cat', 'dog', 'owl'))
    return detector


@pytest.fixture
def images():
    """A batch that no stride divides evenly."""
    return torch.rand(2, 3, 67, 93, generator=torch.Generator().manual_seed(0)) * 255


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / 'a.png', tmp_path / 'b.png']
    for path, size in zip(paths, [(64, 96, 3), (80, 50, 3)]):
        cv2.imwrite(str(path), rng.integers(0, 256, size, dtype=np.uint8))
    return list(map(str, paths))
