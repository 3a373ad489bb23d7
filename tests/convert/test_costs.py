"""How the time of layers and models is measured."""

import pytest
import torch
from torch import nn

from sasa_det.convert import costs
from sasa_det.convert.costs import alternate, compare_layers, share_of_time, take_turns
from sasa_det.convert.walk import watch_calls

IMAGE = torch.zeros(1, 3, 8, 8)


class Clock:
    """Stands for the time, which passes only when it is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(costs.time, 'perf_counter', clock)
    return clock


class Slow(nn.Conv2d):
    """Takes some seconds."""

    def __init__(self, channels, seconds, clock):
        super().__init__(3, channels, 1)
        self.seconds, self.clock = seconds, clock

    def forward(self, x):
        self.clock.pass_by(self.seconds)
        return super().forward(x)


def model_of(a, b, clock):
    return nn.ModuleDict(dict(a=Slow(3, a, clock), b=Slow(6, b, clock)))


def run(model, images):
    return model['b'](model['a'](model['a'](images)))


def test_layers_are_timed_where_they_run(clock):
    teacher, student = model_of(8, 2, clock), model_of(2, 4, clock)
    calls = watch_calls(teacher, ['a', 'b'], [run], IMAGE)
    found = compare_layers(teacher, student, calls, [run], IMAGE)
    assert (found['a']['ms_before'], found['a']['ms_after']) == (16000, 4000)  # called twice
    assert (found['b']['ms_before'], found['b']['ms_after']) == (2000, 4000)
    assert (found['a']['parameters_before'], found['b']['parameters_after']) == (12, 24)
    # Two calls of 64 pixels; a multiply-add is two FLOPs.
    assert found['a']['gflops_before'] == pytest.approx(2 * 64 * 2 * 9 / 1e9)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in teacher.values())
    assert share_of_time(teacher, student, [run], IMAGE) == 8 / 18


def test_functions_take_turns_and_the_first_round_does_not_count(clock):
    order = []

    def take(name, *seconds):
        clock.pass_by(seconds[order.count(name)])
        order.append(name)

    runs = [lambda: take('a', 100, 3, 1, 2, 9, 8), lambda: take('b', 100, 4, 4, 4, 4, 4)]
    assert alternate(runs, 'cpu', least=5) == [3, 4]
    assert order == ['a', 'b'] * 6


def test_quick_functions_are_run_often_and_slow_ones_seldom(clock):
    def rounds(seconds):
        return len(list(take_turns([lambda: clock.pass_by(seconds)], 'cpu')))

    assert rounds(1 / 128) == costs.MOST
    assert rounds(0.5) == costs.SECONDS / 0.5
    assert rounds(32.0) == costs.LEAST
