"""Random shapes and options; ``tools/checks/draws.py`` draws more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import backends

TOOL = Path(__file__).parents[2] / 'tools' / 'checks' / 'draws.py'


@backends('eager', 'native')
def test_two_hundred_draws_agree_with_the_reference(backend):
    command = [sys.executable, str(TOOL), '--draws', '200', '--backend', backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '200 draws, 0 disagree' in done.stdout


@backends('native')
@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_kernels_for_lesser_processors_agree(capability, backend):
    """Those that this build takes on a processor that can less than this one."""
    order = ['DEFAULT', 'AVX2', 'AVX512']
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order or order.index(capability.upper()) > order.index(here):
        pytest.skip(f'this processor is {here}')
    environment = {**os.environ, 'ATEN_CPU_CAPABILITY': capability}
    check = [sys.executable, str(TOOL), '--draws', '80', '--dtypes', 'float64', 'float32']
    done = subprocess.run(check, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    ask = 'from sasa_det.ops.backends.native import _native; print(_native.capability())'
    took = subprocess.run(
        [sys.executable, '-c', ask], capture_output=True, text=True, env=environment
    )
    assert took.stdout.split()[-1] == capability, took.stderr
