"""The op as exported graphs call it, without local_attention: wrong arguments are refused, not trusted."""

import pytest
import torch
from cases import Case, backends

fused = backends('eager', 'native')
OPS = torch.ops.sasa_det
NAMES = ('query', 'key', 'value', 'rel_row', 'rel_col')
OPTIONS = ('kernel_size', 'num_heads', 'dilation', 'border', 'scale')
CASE = Case(kernel_size=5, num_heads=2, depth=4, size=(6, 7))


def arguments(backend, **changes):
    """What the op takes, by name and in the order of its schema, with some of it changed."""
    given = dict(zip(NAMES, CASE.inputs(torch.float32)), **CASE.options, backend=backend)
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    return [given[name] for name in (*NAMES, *OPTIONS, 'backend', 'stride')]


WRONG = {
    'no heads': dict(num_heads=0),
    'negative heads': dict(num_heads=-2),
    'heads that do not divide': dict(num_heads=3),
    'a negative window': dict(kernel_size=-1),
    'an even window': dict(kernel_size=4),
    'another window than the tables': dict(kernel_size=7),
    'no dilation': dict(dilation=0),
    'an unknown border': dict(border='reflect'),
    'an infinite scale': dict(scale=float('inf')),
    'a smaller key': dict(key=lambda x: x[:, :, :-1]),
    'a key of fewer channels': dict(key=lambda x: x[:, :-4]),
    'a smaller batch of values': dict(value=lambda x: x[:1]),
    'values without a batch': dict(value=lambda x: x[0]),
    'a query without a batch': dict(query=lambda x: x[0]),
    'an empty map': dict(query=lambda x: x[..., :0], key=lambda x: x[..., :0], value=lambda x: x[..., :0]),
    'shorter tables': dict(rel_row=lambda x: x[..., :-1], rel_col=lambda x: x[..., :-1]),
    'tables of fewer channels': dict(rel_row=lambda x: x[:, :1], rel_col=lambda x: x[:, :1]),
    'tables of other heads': dict(
        rel_row=lambda x: x.expand(3, -1, -1), rel_col=lambda x: x.expand(3, -1, -1)
    ),
    'one table': dict(rel_col=None),
    'tables of two shapes': dict(rel_col=lambda x: x[..., 1:]),
    'neither key nor tables': dict(key=None, rel_row=None, rel_col=None),
    'another type': dict(value=lambda x: x.double()),
    'no stride': dict(stride=0),
    'a query of every pixel with a stride': dict(stride=2),
    'a query of too few pixels': dict(stride=2, query=lambda x: x[:, :, :3, :3]),
    'a query of too many pixels': dict(stride=2, query=lambda x: x[:, :, :4, :4]),
    'a key of another size that a stride leaves': dict(
        stride=2, query=lambda x: x[:, :, :3, :4], key=lambda x: x[:, :, :5]
    ),
}  # fmt: skip


@fused
@pytest.mark.parametrize('changes', WRONG.values(), ids=WRONG)
def test_the_forward_refuses(changes, backend):
    with pytest.raises((ValueError, TypeError), match='must|come together|may be None'):
        OPS.local_attention(*arguments(backend, **changes))


@fused
@pytest.mark.parametrize('changes', WRONG.values(), ids=WRONG)
def test_the_backward_refuses(changes, backend):
    output, logsumexp = OPS.local_attention(*arguments(backend))
    given = arguments(backend, **changes)
    inputs, options = given[:5], given[5:]
    with pytest.raises((ValueError, TypeError), match='must|come together|may be None'):
        OPS.local_attention_backward(output, *inputs, logsumexp, *options)
    maps = [torch.zeros_like(output) for _ in range(3)]
    with pytest.raises((ValueError, TypeError), match='must|come together|may be None'):
        OPS.local_attention_backward_into(output, *inputs, logsumexp, *maps, *options)
    assert not any(each.any() for each in maps)


@fused
@pytest.mark.parametrize(
    'spoil',
    [lambda x: x[:, :1], lambda x: x[..., :-1], lambda x: x.double(), lambda x: x.flatten(), lambda x: x[:0]],
)  # fmt: skip
def test_the_backward_refuses_another_logsumexp(spoil, backend):
    given = arguments(backend)
    output, logsumexp = OPS.local_attention(*given)
    with pytest.raises(ValueError, match='logsumexp must be'):
        OPS.local_attention_backward(output, *given[:5], spoil(logsumexp), *given[5:])


@fused
def test_the_backward_takes_a_logsumexp_of_other_strides(backend):
    given = arguments(backend)
    output, logsumexp = OPS.local_attention(*given)
    strided = logsumexp.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    ours, truth = (
        OPS.local_attention_backward(output, *given[:5], each, *given[5:])
        for each in (strided, logsumexp)
    )
    assert all(torch.equal(*pair) for pair in zip(ours, truth, strict=True))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match='backend must be one of'):
        OPS.local_attention(*arguments('cudnn'))
