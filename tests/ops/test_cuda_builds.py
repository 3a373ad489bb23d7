"""The CUDA kernels compiled ahead of time, which needs no GPU: instructions, registers and memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import backends

from sasa_det.ops.backends.cuda_launches import KERNELS, Variant
from sasa_det.ops.window import Window
from tools.checks import cuda_builds, cuda_times

ROOT = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(bool(cuda_builds.missing()), reason=cuda_builds.missing())


def run_tool(*arguments, name='cuda_builds'):
    command = [sys.executable, '-m', f'tools.checks.{name}', *arguments]
    env = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    env['PYTHONPATH'] = str(ROOT)
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


def test_the_slowest_part_decides_about_a_predicted_time():
    """A kernel of loads alone, then with exponentials, and then with much to read."""
    second = 4 * cuda_times.MULTIPROCESSORS * cuda_times.CLOCK
    loads = {'LDSM.16.M88.4': second / 16}  # each takes four cycles of what four schedulers share
    found = cuda_times.predict(cuda_times.Work(loads, 0, 0))
    assert found['shared memory'] == pytest.approx(1000)
    assert found['issue'] == pytest.approx(1000 / 16) and 1000 < found['time'] < 1001
    both = {**loads, 'MUFU.EX2': second / 16}
    slower = cuda_times.predict(cuda_times.Work(both, 0, 0))
    assert slower['exponentials'] == pytest.approx(500) and found['time'] < slower['time'] < 1100
    read = cuda_times.predict(cuda_times.Work(both, 0, 3 * cuda_times.MEMORY_BYTES))
    assert read['memory'] == pytest.approx(3000) and 3000 < read['time'] < 3100


@needs_nvcc
@backends('triton')
def test_predicts_times_near_those_measured_and_less_for_the_cuda_kernels(backend):
    done = run_tool(name='cuda_times')
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.strip('| ').split(' | ') for line in done.stdout.splitlines()]
    found = {tuple(row[:2]): float(row[2]) for row in cells[2:6]}
    assert 0.4 <= found['triton', 'forward'] <= 0.6
    assert 1.6 <= found['triton', 'backward'] <= 2.4
    assert found['cuda', 'forward'] <= 0.20
    assert found['cuda', 'backward'] <= 0.60
