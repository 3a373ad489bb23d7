"""The CUDA kernels compiled ahead of time, which needs no GPU: instructions, registers and memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sasa_det.ops.backends.cuda_launches import KERNELS, Variant
from sasa_det.ops.window import Window
from tools.checks import cuda_builds

ROOT = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(bool(cuda_builds.missing()), reason=cuda_builds.missing())


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / 'tools' / 'checks' / 'cuda_builds.py'), *arguments]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(command, env=env, capture_output=True, text=True)


@needs_nvcc
def test_stays_within_the_limits():
    """Instructions per 16 pixels, products and registers; the tool by itself compiles all variants."""
    plain = '--types bfloat16 --depths 32 --windows 7 --variants plain --architectures sm_90'
    done = run_tool(*plain.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert '3 kernels, 0 beyond a limit' in done.stdout


@needs_nvcc
def test_a_kernel_beyond_a_limit_is_found(monkeypatch, capsys):
    limits = dict.fromkeys(KERNELS, (100, 200, 255))
    monkeypatch.setattr(cuda_builds, 'LIMITS', limits)
    monkeypatch.setattr(cuda_builds, 'KERNELS', ('forward',))
    plain = '--types bfloat16 --depths 32 --windows 7 --variants plain --architectures sm_90'
    monkeypatch.setattr(sys, 'argv', ['cuda_builds.py', *plain.split()])
    with pytest.raises(SystemExit) as end:
        cuda_builds.main()
    assert end.value.code
    assert '1 kernels, 1 beyond a limit' in capsys.readouterr().out


@pytest.mark.parametrize('kernel, most', [*zip(KERNELS, (350, 420, 500))])
def test_reads_and_writes_few_bytes(kernel, most):
    """At P3 in a batch of 16, per pixel of a head, from and to the second-level cache."""
    variant = Variant(torch.bfloat16, 32, 7)
    found = cuda_builds.traffic(kernel, variant, (16, 256, 100, 168), Window(7, 8))
    assert 256 < found <= most


@pytest.mark.skipif(bool(cuda_builds.missing('nvrtc')), reason=cuda_builds.missing('nvrtc'))
def test_the_backends_own_compiler_takes_the_source():
    """NVRTC has neither the headers nor the leniency of nvcc."""
    for kernel in KERNELS:
        found = cuda_builds.count(
            cuda_builds.compile_by_nvrtc(kernel, Variant(torch.float16, 8, 3), 'sm_80')
        )
        assert found['local'] == 0 < found['products']
