"""What PyTorch itself can take away: torch.export's program and TorchScript."""

import pytest
import torch
from small_detectors import build

from sasa_det.export.decoded import DecodedDetector
from sasa_det.export.to_onnx import export_program

SIZES = [(1, 3, 67, 93), (3, 3, 128, 40), (2, 3, 17, 33)]


@pytest.fixture(scope='module')
def model():
    return DecodedDetector(build('retina')).eval()


@pytest.fixture(scope='module')
def program(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('program') / 'detector.pt2'
    torch.export.save(export_program(model), path)
    return torch.export.load(path).module()


@pytest.fixture(scope='module')
def script(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('script') / 'detector.pt'
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.zeros(1, 3, 96, 64), check_trace=False)
    torch.jit.save(traced, path)
    return torch.jit.load(path)


@pytest.mark.parametrize('form', ['program', 'script'])
@pytest.mark.parametrize('size', SIZES)
@torch.no_grad()
def test_any_batch_and_size_gives_the_same_numbers(request, model, form, size):
    images = torch.rand(size, generator=torch.Generator().manual_seed(1)) * 255
    for found, expected in zip(request.getfixturevalue(form)(images), model(images)):
        torch.testing.assert_close(found, expected)
