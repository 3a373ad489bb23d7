"""What a training step does on CUDA, as far as a CPU can tell: types, layouts, and no wait of the host."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mmcv
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Run the dry run in a process of its own, which cannot forget the guard that it loads."""
    folder = tmp_path_factory.mktemp('guard')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE.parents[1])}
    env.pop('TRITON_INTERPRET', None)
    done = subprocess.run(
        [sys.executable, HERE / 'cuda_dry_run.py', folder],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_finds_what_waits(run):
    assert run['finds'] == dict(
        item=['_local_scalar_dense'], mask=['index'], cpu=['_to_copy'], tensor=['_to_copy'],
        copy=['copy_'],
    )  # fmt: skip


def test_layers(run):
    """Half the bytes, channels_last and float32 gradients, and Python never waits for the GPU."""
    assert len(run['layers']) == 4
    for options, found in run['layers'].items():
        assert found == dict(
            output='torch.bfloat16', channels_last=[True, True], grads=['torch.float32'],
            devices=['cuda'], waits=[],
        ), options  # fmt: skip


def test_triton_launches(run):
    found = run['triton']
    assert found['waits'] == []
    assert found['tables'] == ['torch.bfloat16'] * 2
    kernels = [kernel for kernel, _, _ in found['launches']]
    assert kernels == ['forward_kernel', 'backward_dq_kernel', 'backward_dkdv_kernel']
    # A multiple of 8 for all strides but the channels': vector loads.
    assert all(programs > 0 and unit == 8 for _, programs, unit in found['launches'])


def test_all_maps_of_a_detector(run):
    """From the image to the scores: bfloat16 in channels_last, without a wait."""
    found = run['detector']
    assert found['waits'] == []
    kinds = found['maps']
    assert kinds.keys() == {'Conv2d', 'BatchNorm2d', 'ReLU', 'LocalSelfAttention2d', 'MaxPool2d'}
    for name, each in kinds.items():
        assert each == [['torch.bfloat16', 'cuda', True]], name


def test_losses(run):
    """What mmcv's kernel is given, of five levels; it would refuse what it was given without us."""
    found = run['detector']
    assert found['losses'] == dict(
        taken=['torch.float32'] * 5, types=[['torch.float32', 'torch.float32']] * 5
    )
    assert found['without'] == '"sigmoid_focal_loss_forward_cuda_kernel": torch.bfloat16'


@pytest.mark.parametrize('name', ['focal_loss', 'roi_align'])
def test_mmcvs_kernels_take_no_bfloat16(name):
    """If this fails, mmcv has learnt it, and NEED_FLOAT32 may be shorter."""
    source = Path(mmcv.__file__).parent / f'ops/csrc/pytorch/cuda/{name}_cuda.cu'
    if not source.is_file():
        pytest.skip('this mmcv comes without its sources')
    macros = set(re.findall(r'AT_DISPATCH_\w+', source.read_text()))
    assert macros == {'AT_DISPATCH_FLOATING_TYPES_AND_HALF'}


def test_synchronised_batch_norm(run):
    """The conversion keeps weights and layouts."""
    assert run['synchronised'] == dict(kept=True, kinds=['SyncBatchNorm'])
