"""The Triton kernels compiled ahead of time, which needs no GPU: that they can be launched, and run well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import backends

ROOT = Path(__file__).resolve().parents[3]


def run_tool(*arguments):
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['PYTHONPATH'] = str(ROOT)
    command = [sys.executable, '-m', 'tools.checks.triton_builds', *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


# What takes the most registers of what is promised; the tool by itself compiles all, for a quarter of
# an hour.
@backends('triton')
@pytest.mark.parametrize(
    'arguments, kernels',
    [
        ('--types bfloat16 --depths 8 32 64 --variants plain', 18),
        ('--types bfloat16 --depths 32 --variants contiguous --capabilities 80', 3),
        ('--types float16 --depths 32 --variants plain --capabilities 90', 3),
        ('--types float32 --depths 16 32 --variants plain --capabilities 80', 6),
    ],
)
def test_builds_do_not_spill_and_fit(arguments, kernels, backend):
    done = run_tool(*arguments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'{kernels} kernels, 0 that spill or do not fit' in done.stdout


@backends('triton')
def test_spills_are_found(backend):
    """In float32 a head of 128 channels takes more registers than there are."""
    done = run_tool(*'--types float32 --depths 128 --variants plain --capabilities 80'.split())
    assert done.returncode == 1, done.stdout + done.stderr
    *_, spilt, count = done.stdout.strip().splitlines()
    assert count.startswith('3 kernels, ') and not count.startswith('3 kernels, 0')
