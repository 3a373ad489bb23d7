"""The benchmark on a GPU, as far as a CPU can tell: what it compares is right, and its report is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.attention_gpu import Report, time_attention, time_detectors
from benchmarks.measuring import Rehearsal
from benchmarks.subjects import Subject, _flex_mask, attend_by_flex
from sasa_det.ops import local_attention

ROOT = Path(__file__).resolve().parents[2]
MACHINE = dict(gpu='none', peak_gflops=100.0, copy_gb_per_s=10.0)


@pytest.mark.parametrize('kernel_size, size', [(3, (5, 8)), (7, (9, 6)), (5, (1, 3))])
def test_flex_attention_computes_the_same(kernel_size, size):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 32, *size)] * 3 + [(1, 2, kernel_size)] * 2
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    output = attend_by_flex(*inputs, _flex_mask(*size, kernel_size, 'cpu'))
    expected = local_attention(*inputs, kernel_size=kernel_size, num_heads=8, backend='reference')
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize('name', ['layer', 'eager', 'conv3x3'])
def test_subjects_are_checked_against_float32(name):
    subject = Subject(name, (2, 128, 13, 21), 7, dtype=torch.bfloat16, layout=torch.channels_last)
    assert subject.leaves[0].is_contiguous(memory_format=torch.channels_last)
    assert subject.check(0.05)
    right = subject.call
    subject.call = lambda *leaves: right(*leaves) * 1.1
    with pytest.raises(AssertionError, match=f'{name} is wrong by 1'):
        subject.check(0.05)


class OnTheCpu(Rehearsal):
    """Larger maps than a rehearsal has, so that figures mean something."""

    rounds = 2

    @staticmethod
    def peak_growth(call):
        call()
        return 2**20

    def size(self, batch, shape):
        return (batch, 32, 4, 6)


def test_report(tmp_path):
    report = Report(tmp_path / 'out', MACHINE, minutes=5, on=OnTheCpu())
    names = ['conv3x3', 'layer', 'no such thing', 'eager']
    time_attention(report, names, 'P7', 2)
    report.write()
    said = json.loads((tmp_path / 'out.json').read_text())
    assert said['machine'] == MACHINE
    conv, layer, eager, missing = said['rows']
    assert (conv['subject'], layer['subject'], eager['subject']) == ('conv3x3', 'layer', 'eager')
    assert conv['forward_ratio'] == 1 and conv['peak_mb'] == 1 and conv['both_host_ms'] > 0
    maps = 4 * 2 * 32 * 4 * 6
    moved = conv['forward_gbytes'] * 1e9 * conv['forward_ms'] / 1e3
    assert moved == pytest.approx(2 * maps + 4 * 9 * 32**2)
    assert missing['not_measured'] == 'no such thing at P7, batch 2' and missing['why']
    markdown = (tmp_path / 'out.md').read_text()
    assert markdown.startswith('gpu none, peak_gflops 100.0')
    assert '\n| P7 | 2 | layer | ' in markdown
    assert '- not measured: no such thing at P7, batch 2: ' in markdown


def test_report_of_detectors(tmp_path):
    """The tiny ones, by the very code that trains the large ones on a GPU."""
    report = Report(tmp_path / 'out', MACHINE, minutes=5, on=OnTheCpu())
    time_detectors(report, 16)
    assert report.missing == []
    assert [row['config'] for row in report.detectors] == list(Rehearsal.detectors)
    assert report.detectors[0]['train_ratio'] == report.detectors[1]['train_mb_ratio'] == 1
    assert f'\n| {Rehearsal.detectors[1]} | 16 | ' in report.markdown()


def test_what_comes_too_late_is_listed(tmp_path):
    report = Report(tmp_path / 'out', MACHINE, minutes=0, on=OnTheCpu())
    time_attention(report, ['conv3x3'], 'P7', 1)
    assert report.rows == []
    assert '- not measured: conv3x3 at P7, batch 1: the time was up' in report.markdown()


def test_what_an_error_leaves_broken_is_listed(tmp_path, monkeypatch):
    """After an illegal access whatever asks the GPU fails, which must not lose what was measured before."""
    report = Report(tmp_path / 'out', MACHINE, minutes=5, on=OnTheCpu())

    def fail():
        raise RuntimeError('illegal memory access')

    monkeypatch.setattr(report.on, 'forget', fail)
    assert report.attempt('a case', lambda: 1) is None
    assert '- not measured: a case: RuntimeError: illegal memory access' in report.markdown()


def test_without_a_gpu_it_says_so(tmp_path):
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(ROOT))
    command = [sys.executable, '-m', 'benchmarks.attention_gpu', '--out', str(tmp_path / 'out')]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    # Before it mmdet's fork says what it could not import.
    assert done.stderr.endswith('This measures an NVIDIA GPU, and torch finds none here.\n')
    assert 'Traceback' not in done.stderr and not list(tmp_path.iterdir())
