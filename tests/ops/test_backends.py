"""Every backend against the reference, in value and all gradients."""

import sys
from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    OPTIONS,
    SMALL,
    STRIDES,
    Case,
    assert_within_the_error_of_plain_pytorch,
    backends,
    largest_error,
    strided,
    value_and_grads,
    with_grad,
)  # fmt: skip

from sasa_det.ops import local_attention
from sasa_det.ops.backends import native

fused = backends('eager', 'native')


@fused
@pytest.mark.parametrize('case', CASES + STRIDES, ids=str)
def test_agrees_with_reference(case, backend):
    inputs = case.inputs()
    expected = value_and_grads(inputs, case.options, 'reference')
    results = value_and_grads(inputs, case.options, backend)
    assert largest_error(results, expected) < 1e-10


def test_eager_agrees_over_several_chunks(monkeypatch):
    """A map that takes many chunks, cut both between images and between rows of tiles."""
    case = Case(kernel_size=5, size=(19, 23), batch=3)
    expected = value_and_grads(case.inputs(), case.options, 'reference')
    for size in (1, 60_000):
        monkeypatch.setattr('sasa_det.ops.backends.eager.CHUNK_BYTES', size)
        results = value_and_grads(case.inputs(), case.options, 'eager')
        assert largest_error(results, expected) < 1e-10


@fused
@pytest.mark.parametrize('case', OPTIONS, ids=str)
def test_gradcheck(case, backend):
    case = Case(**{**vars(case), 'batch': SMALL.batch, 'size': SMALL.size})

    def attend(*inputs):
        return local_attention(*inputs, **case.options, backend=backend)

    assert torch.autograd.gradcheck(attend, with_grad(case.inputs()))


@fused
@pytest.mark.parametrize('case', STRIDES, ids=str)
def test_a_stride_picks_from_what_attends_everywhere(case, backend):
    query, *others = case.inputs()
    everywhere = others[1].new_zeros(others[1].shape)
    everywhere[:, :, :: case.stride, :: case.stride] = query
    options = {**case.options, 'stride': 1}
    full = local_attention(everywhere, *others, **options, backend='reference')
    output = local_attention(query, *others, **case.options, backend=backend)
    expected = full[:, :, :: case.stride, :: case.stride]
    assert largest_error([output], [expected]) < 1e-12


@fused
@pytest.mark.parametrize(
    'case',
    [
        replace(SMALL, stride=2, size=(4, 5)),
        replace(SMALL, stride=2, size=(5, 4), border='mask', positions='per_head'),
        replace(SMALL, stride=3, size=(5, 6), key=False),
        replace(SMALL, stride=2, dilation=3, size=(5, 6), positions=None, border='mask'),
    ],
    ids=str,
)
def test_gradcheck_of_a_stride(case, backend):
    def attend(*inputs):
        return local_attention(*inputs, **case.options, backend=backend)

    assert torch.autograd.gradcheck(attend, with_grad(case.inputs()))


@fused
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', [case for case in CASES + STRIDES if case.batch], ids=str)
def test_low_precision_within_the_error_of_plain_pytorch(case, dtype, backend):
    assert_within_the_error_of_plain_pytorch(case, dtype, backend)


@backends('reference', 'eager', 'native')
@pytest.mark.parametrize(
    'how',
    ['channels_last', 'slice_of_fused', 'slice_of_fused_channels_last', 'transposed', 'every_other',
     'expanded'],
)  # fmt: skip
@pytest.mark.parametrize('dilation, stride', [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_layout_does_not_change_the_result(how, dilation, stride, backend, dtype, tolerance):
    case = Case(kernel_size=5, size=(9, 21), dilation=dilation, stride=stride)
    inputs = case.inputs(dtype)
    maps, tables = inputs[:3], inputs[3:]
    maps = [strided(x, how) for x in maps]
    if how != 'expanded':
        assert not maps[0].is_contiguous()
    expected = local_attention(
        *(x.contiguous() for x in maps), *tables, **case.options, backend=backend
    )
    output = local_attention(*maps, *tables, **case.options, backend=backend)
    assert largest_error([output], [expected]) < tolerance
    channels_last = how.endswith('channels_last')
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=wanted)

    leaves = [x.requires_grad_() for x in (y.detach() for y in maps)]
    cotangent = (
        torch.randn(output.shape, dtype=output.dtype).transpose(2, 3).contiguous().transpose(2, 3)
    )
    grads = torch.autograd.grad(
        local_attention(*leaves, *tables, **case.options, backend=backend), leaves, cotangent
    )
    plain = with_grad([x.contiguous() for x in maps])
    expected = torch.autograd.grad(
        local_attention(*plain, *tables, **case.options, backend=backend),
        plain,
        cotangent.contiguous(),
    )
    assert largest_error(grads, expected) < tolerance


@backends('reference', 'eager', 'native')
def test_result_does_not_depend_on_the_batch(backend):
    case = Case(batch=4, size=(10, 18), kernel_size=5)
    q, k, v, row, col = case.inputs(torch.float32)
    together = local_attention(q, k, v, row, col, **case.options, backend=backend)
    for n in range(4):
        alone = local_attention(
            q[n : n + 1], k[n : n + 1], v[n : n + 1], row, col, **case.options, backend=backend
        )
        assert torch.allclose(together[n : n + 1], alone, rtol=0, atol=1e-6)


@backends('reference', 'eager', 'native')
def test_heads_are_independent(backend):
    """Changing one head's keys and values changes that head's output alone."""
    case = Case(num_heads=4, depth=4)
    q, k, v, row, col = case.inputs()
    before = local_attention(q, k, v, row, col, **case.options, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, 4:8] += 1.5 * torch.randn_like(k[:, 4:8])
    v[:, 4:8] *= -2
    after = local_attention(q, k, v, row, col, **case.options, backend=backend)
    same = (before == after).all(dim=3).all(dim=2).all(dim=0)
    assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 8


@backends('reference', 'eager', 'native')
def test_shifts_with_its_input_away_from_borders(backend):
    case = Case(kernel_size=5, size=(20, 40))
    q, k, v, row, col = case.inputs()
    here = local_attention(q, k, v, row, col, **case.options, backend=backend)
    moved = (x.roll((3, 7), dims=(2, 3)) for x in (q, k, v))
    there = local_attention(*moved, row, col, **case.options, backend=backend)
    inner = (slice(None), slice(None), slice(5, 18), slice(9, 38))
    assert torch.allclose(there[inner], here.roll((3, 7), dims=(2, 3))[inner], atol=1e-12)


@backends('reference', 'eager', 'native')
def test_borders(backend):
    """All logits zero: 'zeros' averages over k * k positions, 'mask' over those in the map."""
    q = torch.zeros(1, 2, 4, 5, dtype=torch.float64)
    v = torch.ones_like(q)
    options = dict(kernel_size=3, num_heads=1, backend=backend)
    zeros = local_attention(q, q, v, **options, border='zeros')
    assert torch.allclose(zeros[0, 0, 0], torch.tensor([4, 6, 6, 6, 4], dtype=q.dtype) / 9)
    assert torch.allclose(zeros[0, 0, 1:3, 1:4], torch.ones(2, 3, dtype=q.dtype))
    assert torch.allclose(local_attention(q, q, v, **options, border='mask'), v)


@fused
def test_output_may_be_changed_in_place(backend):
    """A convolution's may, and mmcv's ConvModule does so with its ReLU."""
    case = Case()
    leaves, others = with_grad(case.inputs()), with_grad(case.inputs())
    local_attention(*leaves, **case.options, backend=backend).relu_().sum().backward()
    local_attention(*others, **case.options, backend=backend).relu().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, others))


@backends('native')
@pytest.mark.parametrize(
    'case',
    [
        # So many heads that one thread takes uncut maps, and more threads take bands. Query rows go by
        # three, and the rows of keys that their windows cover have each remainder.
        Case(kernel_size=5, num_heads=4, depth=8, batch=1, size=(80, 45)),
        Case(kernel_size=7, num_heads=4, depth=8, batch=1, size=(80, 45), border='mask'),
        Case(kernel_size=9, num_heads=4, depth=6, batch=1, size=(82, 45)),
        # So many phases that several share a partial of the tables' gradients.
        Case(kernel_size=11, num_heads=2, depth=8, batch=1, size=(20, 13), dilation=7),
        # Bands of queries, of which each sees others' keys.
        Case(kernel_size=7, num_heads=2, depth=8, batch=1, size=(161, 45), stride=2),
        Case(kernel_size=3, num_heads=2, depth=8, batch=1, size=(250, 20), stride=3, border='mask'),
        Case(kernel_size=1, num_heads=2, depth=8, batch=1, size=(150, 20), stride=2),
    ],
    ids=['rows 5', 'rows 7', 'rows 9', 'phases', 'stride 2', 'stride 3', 'gaps'],
)
def test_native_has_the_same_bits_at_any_thread_count(backend, case):
    inputs = case.inputs(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            if sys.platform == 'linux':  # where setup.py asks for OpenMP
                assert native._native.threads() == count
            results.append(value_and_grads(inputs, case.options, backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@backends('native')
@pytest.mark.parametrize('kernel_size, height, stride', [(67, 80, 1), (73, 96, 1), (127, 200, 5)])
def test_native_windows_larger_than_a_band(kernel_size, height, stride, backend):
    # The second band's windows reach above the map, and below it.
    case = Case(
        kernel_size=kernel_size,
        num_heads=1,
        depth=2,
        batch=1,
        size=(height, 3),
        stride=stride,
        border='mask',
    )
    results = value_and_grads(case.inputs(), case.options, backend)
    truth = value_and_grads(case.inputs(), case.options, 'reference')
    assert largest_error(results, truth) < 1e-10


@backends('native')
def test_native_takes_any_dilation(backend):
    case = Case(kernel_size=3, num_heads=1, depth=4, batch=1, size=(3, 5))
    far = {**case.options, 'dilation': 2**40}
    near = {**case.options, 'dilation': 5}
    for a, b in zip(
        value_and_grads(case.inputs(), far, backend), value_and_grads(case.inputs(), near, backend)
    ):
        assert torch.equal(a, b)
