"""The Triton kernels under Triton's interpreter, on small maps: it takes a fifth of a second a tile.

What holds for every backend is written down in test_backends.py and test_library.py; these are the same
checks on fewer cases. test_triton_gpu.py has what takes a GPU.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    OPTIONS,
    Case,
    assert_within_the_error_of_plain_pytorch,
    backends,
    largest_error,
    strided,
    value_and_grads,
    with_grad,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import local_attention
from sasa_det.ops.backends.reference import window_logits
from sasa_det.ops.backends.triton_launches import backward_launches, forward_launch
from sasa_det.ops.window import Window

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason='test_triton_gpu.py runs on the GPU here'),
    backends('triton'),
]

ONE = replace(Case(), batch=1, size=(3, 4))
# Every combination of the options in one tile; dilation, which takes four, with some of them.
SMALL_OPTIONS = [replace(case, batch=1, size=(3, 4)) for case in OPTIONS if case.dilation == 1] + [
    Case(num_heads=1, batch=1, size=(3, 4), dilation=2, border=border, key=key, positions='shared')
    for border, key in (('zeros', True), ('mask', False))
]
# Several tiles down and across, maps smaller than the window, each block of keys, odd depths, two images.
SMALL_SIZES = [
    replace(case, num_heads=1)
    for case in (
        replace(ONE, kernel_size=1, size=(5, 17)),
        replace(ONE, kernel_size=5, size=(6, 13), border='mask'),
        replace(ONE, kernel_size=7, size=(7, 11)),
        replace(ONE, kernel_size=7, size=(2, 1), border='mask'),
        replace(ONE, kernel_size=13, size=(3, 4), border='mask'),
        replace(ONE, kernel_size=31, size=(2, 3)),
        replace(ONE, batch=2, size=(1, 1), depth=10),
        replace(ONE, depth=24, size=(2, 5)),
        replace(ONE, depth=128, size=(2, 2)),
        replace(ONE, depth=3, positions=None, border='mask'),
        replace(ONE, size=(18, 2)),  # more tiles than are summed at once
        replace(ONE, batch=0),
    )
]


@pytest.mark.parametrize('case', SMALL_OPTIONS + SMALL_SIZES, ids=str)
def test_agrees_with_reference(case, backend):
    """The interpreter computes in float64, which shows what rounding would hide."""
    expected = value_and_grads(case.inputs(), case.options, 'reference')
    results = value_and_grads(case.inputs(), case.options, backend)
    assert largest_error(results, expected) < 1e-10


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'case',
    [replace(case, num_heads=1 + (case.positions == 'per_head')) for case in SMALL_OPTIONS]
    + [Case(num_heads=1, batch=1, depth=8, border='mask', kernel_size=7, size=(5, 9))],
    ids=str,
)
def test_low_precision_within_the_error_of_plain_pytorch(case, dtype, backend):
    assert_within_the_error_of_plain_pytorch(case, dtype, backend)


@pytest.mark.parametrize(
    'how',
    ['channels_last', 'slice_of_fused_channels_last', 'transposed', 'every_other', 'expanded'],
)
def test_layout_does_not_change_the_result(how, backend):
    # Eight channels, so that channels_last takes the path of aligned strides.
    case = replace(ONE, num_heads=1, depth=8)
    *maps, row, col = case.inputs()
    maps = [strided(x, how) for x in maps]
    expected = value_and_grads([*(x.contiguous() for x in maps), row, col], case.options, backend)
    leaves = [x.detach().requires_grad_() for x in maps]
    output = local_attention(*leaves, row, col, **case.options, backend=backend)
    assert largest_error([output.detach()], expected[:1]) < 1e-12
    last = how.endswith('channels_last')
    wanted = torch.channels_last if last else torch.contiguous_format
    assert output.is_contiguous(memory_format=wanted)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    cotangent = cotangent.transpose(2, 3).contiguous().transpose(2, 3)
    assert largest_error(torch.autograd.grad(output, leaves, cotangent), expected[1:4]) < 1e-12


def test_addresses_past_two_to_the_31(backend):
    """Rows that lie 2**31 elements apart, in memory of which no more than a few pages are touched."""
    apart = 2**31
    memory = torch.from_numpy(np.empty(apart + 64, dtype=np.float16))
    far = torch.as_strided(memory, (3, 1, 2, 2, 4), (24, 8, 4, apart, 1))
    near = torch.randn(far.shape, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    options = dict(kernel_size=3, num_heads=1, backend=backend)
    assert torch.equal(
        local_attention(*far.unbind(), **options), local_attention(*near.unbind(), **options)
    )


def test_logits_of_ten_thousands(backend):
    """A weight's relative error is the rounding of its logit, so that is what the output may have."""
    case = replace(ONE, scale=1e4)
    inputs = case.inputs(torch.float32)
    q, k, v, row, col = (x.double() for x in inputs)
    truth = local_attention(q, k, v, row, col, **case.options, backend='reference')
    output, *grads = value_and_grads(inputs, case.options, backend)
    largest = window_logits(q, k, row, col, Window(**case.options)).abs().max()
    assert largest > 1e4
    rounding = 4 * largest * torch.finfo(torch.float32).eps
    assert (output - truth).abs().max() <= rounding * v.abs().max()
    assert all(x.isfinite().all() for x in grads)


def test_any_dilation(backend):
    far = replace(ONE, num_heads=1, dilation=2**40, size=(2, 3))
    near = replace(far, dilation=3)
    for a, b in zip(
        value_and_grads(far.inputs(), far.options, backend),
        value_and_grads(far.inputs(), near.options, backend),
    ):
        assert torch.equal(a, b)


def test_heads_and_images_are_independent(backend):
    """Changing one image's values in one head changes that image's output in that head alone."""
    case = replace(ONE, batch=2)
    q, k, v, row, col = case.inputs()
    before = local_attention(q, k, v, row, col, **case.options, backend=backend)
    v = v.clone()
    v[1, 4:] *= -2
    after = local_attention(q, k, v, row, col, **case.options, backend=backend)
    same = (before == after).flatten(2).all(2)
    assert same.tolist() == [[True] * 8, [True] * 4 + [False] * 4]


def test_output_may_be_changed_in_place(backend):
    leaves, others = with_grad(ONE.inputs()), with_grad(ONE.inputs())
    local_attention(*leaves, **ONE.options, backend=backend).relu_().sum().backward()
    local_attention(*others, **ONE.options, backend=backend).relu().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, others))


def test_opcheck(backend):
    op = torch.ops.sasa_det.local_attention.default
    inputs = with_grad(replace(ONE, num_heads=1).inputs(torch.float32))
    torch.library.opcheck(op, (*inputs, 3, 1, 1, 'zeros', 0.8, backend))


def test_compiles_as_one_graph(backend):
    def attend(*tensors):
        return local_attention(*tensors, **ONE.options, backend=backend).relu()

    compiled = torch.compile(attend, fullgraph=True, backend='aot_eager')
    leaves, others = with_grad(ONE.inputs()), with_grad(ONE.inputs())
    output, expected = compiled(*leaves), attend(*others)
    assert torch.equal(output, expected)
    for grad, wanted in zip(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(expected.sum(), others)
    ):
        assert torch.equal(grad, wanted)


def test_autocast_computes_in_its_type(backend):
    inputs = ONE.inputs(torch.float32)
    leaves = with_grad(inputs)
    with torch.autocast('cpu', torch.bfloat16):
        output = local_attention(*leaves, **ONE.options, backend=backend)
    low = [x.bfloat16() for x in inputs]
    assert torch.equal(output, local_attention(*low, **ONE.options, backend=backend))
    output.sum().backward()
    assert [x.grad.dtype for x in leaves] == [torch.float32] * 5


def test_activation_checkpointing_gives_the_same_gradients(backend):
    def attend(*tensors):
        return local_attention(*tensors, **ONE.options, backend=backend)

    leaves, others = with_grad(ONE.inputs()), with_grad(ONE.inputs())
    checkpoint(attend, *leaves, use_reentrant=False).square().sum().backward()
    attend(*others).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, others))


class CopiesOfMaps(TorchDispatchMode):
    """Collect the operations that do no more than copy a map, as a change of layout does."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ('clone', 'copy_', '_to_copy', 'contiguous'):
            if result.numel() >= self.size:
                self.found.append(func)
        return result


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_layer(layout, backend):
    """Queries, keys and values are slices of one projection there, and no map is transposed."""
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=1, bias=True, backend=backend).double()
    x = torch.randn(1, 8, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    wanted = [x.requires_grad_(), *layer.parameters()]
    cotangent = torch.randn_like(x)
    with CopiesOfMaps(x.numel()) as copies:
        output = layer(x)
        grads = torch.autograd.grad(output, wanted, cotangent)
    assert not copies.found
    assert output.is_contiguous(memory_format=layout)
    assert grads[0].is_contiguous(memory_format=layout)
    layer.backend = 'reference'
    expected = layer(x)
    assert largest_error([output.detach()], [expected.detach()]) < 1e-10
    truth = torch.autograd.grad(expected, wanted, cotangent)
    assert largest_error(grads, truth) < 1e-10


def test_another_image_size_compiles_nothing_anew(backend):
    """All that Triton compiles for is the same: constants, and which integers are one."""

    def compiled_for(shape, layout):
        maps = torch.zeros(3, *shape).to(torch.bfloat16)
        q, k, v = (x.contiguous(memory_format=layout) for x in maps)
        row, col = torch.zeros(2, 1, shape[1] // 8, 7).to(torch.bfloat16)
        output, logsumexp = torch.empty_like(q), torch.empty(shape[0], 4, *shape[2:])
        window = Window(kernel_size=7, num_heads=4)
        partials = logsumexp.new_empty(1)
        launches = backward_launches(
            output, q, k, v, row, col, logsumexp, q, k, v, partials, window
        )
        launches.append(forward_launch(q, k, v, row, col, output, logsumexp, window))
        return [
            {
                name: x if name.isupper() or name.startswith('num_w') else x == 1
                for name, x in launch.arguments.items()
                if not isinstance(x, torch.Tensor) and not re.fullmatch('stride_.+[bh]', name)
            }
            for launch in launches
        ]

    for layout in (torch.contiguous_format, torch.channels_last):
        first, *others = (
            compiled_for((batch, 64, height, width), layout)
            for batch, height, width in ((1, 40, 56), (2, 41, 57), (4, 25, 13))
        )
        assert first[0]['WINDOW'] == 7
        assert all(other == first for other in others)


def test_refuses_what_it_cannot(backend):
    x = torch.zeros(1, 2, 1, 1)
    with pytest.raises(RuntimeError, match='triton: it takes kernel_size up to 31, but it is 33'):
        local_attention(x, x, x, kernel_size=33, num_heads=1, backend=backend)
    x = torch.zeros(1, 136, 1, 1)
    with pytest.raises(RuntimeError, match='it takes up to 128 channels a head, but there are 136'):
        local_attention(x, x, x, kernel_size=3, num_heads=1, backend=backend)
