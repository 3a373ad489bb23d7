"""The public function: what it refuses, and how it chooses."""

import logging

import pytest
import torch

from sasa_det.ops import available_backends, local_attention
from sasa_det.ops.backends import choice

X = torch.zeros(1, 8, 5, 6)
TABLE = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(kernel_size=4), r'kernel_size must be an odd integer of at least 1, but is 4'),
        (dict(kernel_size=-1), r'kernel_size .* but is -1'),
        (dict(kernel_size=3.0), r'kernel_size .* but is 3.0'),
        (dict(kernel_size=True), r'kernel_size .* but is True'),
        (dict(num_heads=3), r'num_heads must divide the channels of query, 8, but is 3'),
        (dict(num_heads=0), r'num_heads must be an integer of at least 1, but is 0'),
        (dict(dilation=0), r'dilation must be an integer of at least 1, but is 0'),
        (dict(stride=0), r'stride must be an integer of at least 1, but is 0'),
        (dict(stride=2.0), r'stride must be an integer of at least 1, but is 2.0'),
        (
            dict(stride=2),
            r'query must have every pixel of key that a stride of 2 leaves, but they are',
        ),
        (dict(border='reflect'), r"border must be one of \('zeros', 'mask'\), but is 'reflect'"),
        (dict(scale=float('nan')), r'scale must be a finite number, but is nan'),
        (dict(scale='1'), r"scale must be a finite number, but is '1'"),
        (dict(backend='cudnn'), r"backend must be one of .*'eager'.*, but is 'cudnn'"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        local_attention(X, X, X, **{**dict(kernel_size=3, num_heads=2), **options})


@pytest.mark.parametrize(
    'tensors, message',
    [
        ((None, X, X), r'query must be a tensor, but is a NoneType'),
        ((X, X, None), r'value must be a tensor, but is a NoneType'),
        ((X, X.numpy(), X), r'key must be a tensor, but is a ndarray'),
        ((X, X.to_sparse(), X), r'key must be a dense tensor, but its layout is torch.sparse_coo'),
        ((X[0], X, X), r'query must be \(B, C, H, W\)'),
        ((X.int(), X, X), r'query .* torch.int32'),
        ((X[:, :, :0], X, X), r'query must be at least one pixel large'),
        ((X, X[..., :3], X), r'key must be of the shape of query, \(1, 8, 5, 6\), but is'),
        ((X, X, X[:, :4]), r'value must be of the shape of query'),
        ((X, None, X), r'key may be None only where rel_row and rel_col are given'),
        ((X, X, X, TABLE), r'come together, but rel_col is None'),
        ((X, X, X, None, TABLE), r'come together, but rel_row is None'),
        ((X, X, X, TABLE, TABLE[..., :1]), r'rel_col must be \(2 or 1, 2, 3\)'),
        ((X, X, X, TABLE.expand(3, 2, 3), TABLE), r'rel_row must be .* but is \(3, 2, 3\)'),
        ((X, X, X, TABLE, TABLE.expand(2, 2, 3)), r'both .* \(1, 2, 3\) and \(2, 2, 3\)'),
        ((X, X.to('meta'), X), r'key must be on the device of query, cpu, but is on meta'),
    ],
)
def test_refuses_tensors(tensors, message):
    with pytest.raises(ValueError, match=message):
        local_attention(*tensors, kernel_size=3, num_heads=2)


def test_refuses_positions_of_odd_depth():
    with pytest.raises(
        ValueError, match='even number of channels per head, but 8 channels in 8 heads'
    ):
        local_attention(X, X, X, TABLE, TABLE, kernel_size=3, num_heads=8)


def test_backend_by_name_never_falls_back():
    missing = [name for name, reason in available_backends().items() if reason]
    for name in missing:
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot be used: {name}: "):
            local_attention(X, X, X, kernel_size=3, num_heads=2, backend=name)


def test_native_refuses_what_it_cannot(monkeypatch):
    x = torch.zeros(1, 2, 1, 1)
    if available_backends()['native'] is None:
        with pytest.raises(
            RuntimeError, match='native: it takes kernel_size up to 127, but it is 129'
        ):
            local_attention(x, x, x, kernel_size=129, num_heads=1, backend='native')
    assert local_attention(x, x, x, kernel_size=129, num_heads=1).shape == x.shape


def test_auto_says_at_debug_level_what_it_takes_and_why(caplog):
    with caplog.at_level(logging.DEBUG, logger='sasa_det'):
        local_attention(X, X, X, kernel_size=3, num_heads=2)
    (record,) = caplog.records
    fastest = next(name for name in ('native', 'eager') if available_backends()[name] is None)
    assert f'takes {fastest}; not cuda: ' in record.getMessage()
    assert '; not triton: ' in record.getMessage()


def test_a_slow_choice_is_told_once(caplog):
    """A window of 129 took eager in silence, some hundred times as long as one of 127."""
    x = torch.zeros(1, 2, 1, 1)
    choice._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger='sasa_det'):
        for _ in range(2):
            local_attention(x, x, x, kernel_size=129, num_heads=1)
        local_attention(x, x, x, kernel_size=129, num_heads=1, backend='eager')
    (record,) = caplog.records
    assert 'computes in plain PyTorch, which is slow: native: ' in record.getMessage()
    choice._warn_once.cache_clear()


def test_available_backends_names_a_reason():
    reasons = available_backends()
    assert reasons['reference'] is None and reasons['eager'] is None
    assert all(reason is None or len(reason) > 10 for reason in reasons.values())
