"""What a forward and backward take beside their inputs."""

import subprocess
import sys
from pathlib import Path

import pytest
from cases import backends

pytestmark = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='read from /proc')

# In a process of its own: the peak of a process only ever grows.
MEASURE = """
import re, sys
import torch
from sasa_det.ops import local_attention

def peak():
    # Not getrusage's, which a process takes over from the one that started it.
    return int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])

def attend(size, dilation=1):
    maps = [torch.ones(1, 256, *size).requires_grad_() for _ in range(3)]
    tables = [torch.ones(1, 16, 7).requires_grad_() for _ in range(2)]
    # The output's gradient exists before the measurement, as it does in training.
    grad = torch.ones(1, 256, *size)
    before = peak()
    output = local_attention(*maps, *tables, kernel_size=7, num_heads=8, dilation=dilation, backend=sys.argv[1])
    torch.autograd.grad(output, [*maps, *tables], grad)
    return peak() - before

attend((8, 8))  # whatever a first call loads
print(attend((int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4])))
"""


def extra_peak(backend, height=100, width=168, dilation=1):
    """Return the extra peak memory in KiB; by default at RetinaNet's P3 of a 1333 x 800 image."""
    options = [str(n) for n in (height, width, dilation)]
    command = [sys.executable, '-W', 'ignore', '-c', MEASURE, backend, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])  # mmdet's fork prints when it is imported


@backends('eager', 'native')
def test_extra_peak_is_a_fraction_of_the_references(backend):
    # Outputs and gradients alone are four maps of 17 MB.
    assert 4 * 17e3 < extra_peak(backend) <= extra_peak('reference') / 4


@backends('native')
@pytest.mark.parametrize('height, width', [(48, 48), (2304, 1)])
def test_no_temporary_is_larger_than_an_input_however_far_apart_neighbours_are(
    backend, height, width
):
    # As many phases as pixels, each of which adds to the gradients of the positions, against one.
    one_map = 256 * height * width * 4 // 1024
    one, most = (extra_peak(backend, height, width, n) for n in (1, max(height, width)))
    assert 4 * one_map < most <= one + one_map
