import pytest
import torch
from small_detectors import build
from torch.profiler import ProfilerActivity, profile

from benchmarks.detector_profile import (
    BACKWARD,
    EVENTS,
    MODULES,
    PYTHON,
    RANGE,
    SUMS,
    _kind,
    _kinds_of_forwards,
    format_shares,
    marked,
    time_by_kind,
)


@pytest.fixture(scope='module')
def detector():
    return build('retina').train()


def step(detector):
    scores, boxes = detector.bbox_head(detector.extract_feat(torch.ones(1, 3, 64, 64)))
    sum(each.sum() for each in (*scores, *boxes)).backward()


def test_a_backward_is_of_the_kind_of_its_forward(detector):
    with marked(detector), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(detector)
    events = profiler.events()
    forwards = _kinds_of_forwards(events)
    found = {}
    for event in events:
        if event.name.startswith(BACKWARD):
            found.setdefault(event.name[len(BACKWARD) :], set()).add(_kind(event, forwards))
    assert found['ConvolutionBackward0'] == {'convolution'}
    assert found['NativeBatchNormBackward0'] == {'batch norm'}
    assert found['ReluBackward0'] == {'ReLU'}
    assert found['UpsampleNearest2DBackward0'] == {'upsampling'}
    assert found['_ProjectedAttentionBackward'] == {'attention'}
    assert found['torch::autograd::AccumulateGrad'] == {'gradients and optimizer'}
    kernels = {_kind(each, forwards) for each in events if each.name.startswith('sasa_det')}
    assert kernels == {'attention'}


def test_kinds_add_up_to_the_time_of_a_call(detector):
    hooks = sum(len(each._forward_hooks) for each in detector.modules())
    with marked(detector):
        times = time_by_kind(lambda: step(detector), 1)
    assert hooks == sum(len(each._forward_hooks) for each in detector.modules())
    assert 'loss_by_feat' not in vars(detector.bbox_head)
    names = {'attention', 'convolution', 'batch norm', 'ReLU', 'pooling', SUMS, PYTHON}
    assert all(times[name] > 0 for name in names)
    rows = [dict(kind=name, training=times[name]) for name in times]
    shares = [float(line.split()[-2][:-1]) for line in format_shares({}, rows).splitlines()[4:]]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_no_kind_hides_another():
    assert not set(MODULES.values()) & {SUMS, *EVENTS.values()}
    assert not any(name.startswith(RANGE) for name in EVENTS)
