import json
import sys

import numpy as np
import pytest
import torch
from small_detectors import save
from torch.torch_version import TorchVersion

onnx = pytest.importorskip('onnx', reason="the extra 'export' is not installed")
onnxruntime = pytest.importorskip('onnxruntime', reason="the extra 'export' is not installed")

from sasa_det.cli.main import main  # noqa: E402
from sasa_det.export.decoded import DecodedDetector  # noqa: E402
from sasa_det.export.to_onnx import check_writable, export_onnx, import_onnx  # noqa: E402


@pytest.fixture(scope='module')
def exported(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp('exported') / 'detector.onnx'
    export_onnx(detector, path)
    return path


@pytest.mark.parametrize('size', [(1, 3, 67, 93), (3, 3, 128, 40), (2, 3, 16, 16)])
@torch.no_grad()
def test_any_batch_and_size_gives_what_pytorch_gives(detector, exported, size):
    images = torch.rand(size, generator=torch.Generator().manual_seed(1)) * 255
    found = onnxruntime.InferenceSession(exported).run(None, dict(images=images.numpy()))
    expected = DecodedDetector(detector)(images)
    assert [each.shape for each in found] == [tuple(each.shape) for each in expected]
    assert np.abs(found[0] - expected[0].numpy()).max() < 1e-2
    assert np.abs(found[1] - expected[1].numpy()).max() < 1e-4


def test_the_file_says_what_it_is(exported):
    model = onnx.load(exported)
    meta = {each.key: each.value for each in model.metadata_props}
    assert json.loads(meta['classes']) == ['cat', 'dog', 'owl']
    assert meta['detector'] == 'RetinaNet' and model.producer_name == 'sasa_det'
    assert [each.version for each in model.opset_import if not each.domain] == [18]

    def sizes(values):
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values
        }

    assert sizes(model.graph.input) == dict(images=['batch', 3, 'height', 'width'])
    assert sizes(model.graph.output) == dict(
        boxes=['batch', 'priors', 4], scores=['batch', 'priors', 3]
    )
    # No operator of ours or of another's.
    domains = {node.domain for node in model.graph.node}
    assert domains <= {'', 'pkg.onnxscript.torch_lib', 'pkg.onnxscript.torch_lib.common'}


def test_no_window_is_unfolded(exported, tmp_path):
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / 'profile')
    session = onnxruntime.InferenceSession(exported, options)
    session.run(None, dict(images=np.zeros((1, 3, 160, 224), np.float32)))
    events = json.loads(open(session.end_profiling(), encoding='utf-8').read())
    largest = max(int(event.get('args', {}).get('output_size', 0)) for event in events)
    # That is the image. 5 x 5 windows of the attention's 16 channels would be twice as much.
    assert 0 < largest <= 3 * 160 * 224 * 4 < 25 * 16 * 20 * 28 * 4


@pytest.mark.parametrize('kind', ['nowhere/detector.onnx', '.'])
def test_what_cannot_be_written_is_said_first(detector, tmp_path, kind):
    with pytest.raises(OSError, match='cannot be written|is a folder'):
        export_onnx(detector, tmp_path / kind)
    check_writable(tmp_path / 'detector.onnx')


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r"pip install 'sasa_det\[export\]'"):
        import_onnx()


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, '__version__', TorchVersion('2.2.2+cpu'))
    with pytest.raises(ImportError, match=r'takes torch 2\.9 or later, and this is 2\.2\.2\+cpu$'):
        import_onnx()


@pytest.fixture(scope='module')
def checkpoint(detector, tmp_path_factory):
    """A folder as training leaves it, of the detector above."""
    return save(detector, tmp_path_factory.mktemp('trained'))


def test_command_with_suppression(checkpoint, photos, capsys):
    config = str(checkpoint.parent / 'small.py')
    command = ['export', config, str(checkpoint), '--to', 'onnx', '--nms', '--check', *photos]
    assert main(command) == 0
    printed, said = capsys.readouterr()
    steps = [
        f'Loading {checkpoint}',
        f'detector: {checkpoint} with {config} on cpu',
        f'Exporting to {checkpoint.with_suffix(".onnx")}, which takes a minute or a few',
        'Comparing with PyTorch on 2 images',
    ]
    assert [line for line in said.splitlines() if line in steps] == steps
    assert f'{checkpoint.with_suffix(".onnx")}: ' in printed and 'opset 18' in printed
    assert 'boxes in 2 images: apart from PyTorch by' in printed
    found = onnxruntime.InferenceSession(checkpoint.with_suffix('.onnx'))
    assert [each.name for each in found.get_outputs()] == ['boxes', 'scores', 'labels', 'images_of']


@pytest.mark.parametrize(
    'more, message',
    [
        (['--opset', '9'], 'opset must be 18 to 23, but is 9'),
        (['--check', 'nowhere.png'], 'nowhere.png: cannot be loaded by the test pipeline'),
        ([], 'there are no images to compare with PyTorch on in data/nowhere'),
        (['--out', 'nowhere/a.onnx'], 'nowhere/a.onnx: cannot be written, there is no folder nowhere'),
    ],
)  # fmt: skip
def test_command_refuses(checkpoint, more, message, capsys):
    config = str(checkpoint.parent / 'small.py')
    assert main(['export', config, str(checkpoint), '--to', 'onnx', *more]) == 2
    assert message in capsys.readouterr().err
