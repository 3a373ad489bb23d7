"""When Triton is imported, and what happens where that fails: in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(code, path=None):
    """Run Python without a GPU and without the interpreter, with a folder before all other packages."""
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['CUDA_VISIBLE_DEVICES'] = ''
    env['PYTHONPATH'] = os.pathsep.join(map(str, filter(None, (path, ROOT))))
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)


def last_lines(done, count=1):
    """What the code printed; mmdet's fork has printed something before, as it was imported."""
    return done.stdout.splitlines()[-count:]


ON_THE_CPU = """
import sys
import torch
import sasa_det
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import available_backends

layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=2)
layer(torch.randn(1, 8, 5, 6)).sum().backward()
assert 'triton' not in sys.modules, 'imported by a layer on the CPU'
print(available_backends()['triton'])
assert 'triton' not in sys.modules, 'imported by the question'
"""


def test_the_cpu_does_without_triton():
    done = run(ON_THE_CPU)
    assert done.returncode == 0, done.stderr
    assert last_lines(done) == ['it computes on NVIDIA GPUs, and torch finds none here']


def test_a_broken_triton_does_no_harm(tmp_path):
    package = tmp_path / 'triton'
    package.mkdir()
    (package / '__init__.py').write_text("raise AttributeError('broken on purpose')\n")
    done = run(ON_THE_CPU, tmp_path)
    assert done.returncode == 0, done.stderr


def test_says_what_is_wrong_with_triton(tmp_path):
    (tmp_path / 'triton.py').write_text("raise AttributeError('broken on purpose')\n")
    code = """
import os
os.environ['TRITON_INTERPRET'] = '1'
import torch
from sasa_det.ops import available_backends, local_attention

print(available_backends()['triton'])
x = torch.zeros(1, 2, 3, 3)
try:
    local_attention(x, x, x, kernel_size=3, num_heads=1, backend='triton')
except RuntimeError as error:
    print(error)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    reason = 'Triton does not import (AttributeError: broken on purpose)'
    listed, raised = last_lines(done, 2)
    assert listed == reason
    assert raised.endswith(f"backend='triton' cannot be used: triton: {reason}")


def test_says_that_a_gpu_is_too_old():
    code = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda gpu: ((7, 0), (7, 5))[gpu]
from sasa_det.ops import available_backends

print(available_backends()['triton'])
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    least = 'it takes GPUs of compute capability 8.0 and later'
    assert last_lines(done) == [f'{least}, but the newest here has 7.5']


def test_flops_are_counted_however_late_the_counter_is_imported():
    code = """
import torch
from sasa_det.ops import local_attention
from torch.utils.flop_counter import FlopCounterMode

x = torch.zeros(1, 2, 3, 3)
with FlopCounterMode(display=False) as counter:
    local_attention(x, x, x, kernel_size=3, num_heads=1)
print(counter.get_total_flops())
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert last_lines(done) == [str(2 * 2 * 9 * 18)]
