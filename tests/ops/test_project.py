"""Projections by the C++ kernels: against float64, for all shapes, layouts and numbers of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sasa_det.ops.native_library import load
from sasa_det.ops.project import _by_pytorch, project, project_backward

pytestmark = pytest.mark.skipif(load()[0] is None, reason='the C++ kernels are not built')
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Rounding of a sum of so many products of normal numbers, with room.
ERROR = 1e-5


def maps(seed, images, inputs, outputs, height, width, layout):
    """Draw a map, a weight, a bias, and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, grad = draw(images, inputs, height, width), draw(images, outputs, height, width)
    x, grad = (each.contiguous(memory_format=layout) for each in (x, grad))
    return x, draw(outputs, inputs), draw(outputs), grad


def differ(result, expected, terms):
    """The largest error, in units of that of a sum of so many terms."""
    return (result - expected).abs().max().item() / terms**0.5


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**16),
    images=st.integers(1, 3),
    # Less than a panel, several, and more than a block of the depth.
    inputs=st.sampled_from([1, 3, 8, 50, 400]),
    outputs=st.sampled_from([1, 5, 48, 96, 130]),
    height=st.integers(1, 14),
    width=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    has_bias=st.booleans(),
)
def test_matches_float64(seed, images, inputs, outputs, height, width, layout, has_bias):
    x, weight, bias, grad = maps(seed, images, inputs, outputs, height, width, layout)
    bias = bias if has_bias else None
    exact = _by_pytorch(x.double(), weight.double(), None if bias is None else bias.double())
    y = project(x, weight, bias)
    # A map of one channel has both layouts.
    assert x.is_contiguous() or y.is_contiguous(memory_format=layout)
    assert differ(y, exact, inputs) < ERROR
    wanted = (True, True, has_bias)
    grads = project_backward(grad, x, weight, wanted)
    expected = project_backward(grad.double(), x.double(), weight.double(), wanted)
    pixels = images * height * width
    for result, right, terms in zip(grads, expected, (outputs, pixels, pixels)):
        assert (result is None) == (right is None)
        assert result is None or differ(result, right, terms) < ERROR


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_bits_do_not_depend_on_threads(layout):
    x, weight, bias, grad = maps(0, 2, 100, 130, 50, 70, layout)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            grads = project_backward(grad, x, weight, (True, True, False))
            found.append((project(x, weight, bias), *grads[:2]))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))


def test_strided_and_transposed_inputs():
    x, weight, bias, grad = maps(1, 2, 24, 40, 9, 11, torch.contiguous_format)
    exact = _by_pytorch(x.double(), weight.double(), bias.double())
    wide = torch.zeros(2, 24, 9, 22)
    wide[..., ::2] = x
    assert differ(project(wide[..., ::2], weight.t().contiguous().t(), bias), exact, 24) < ERROR
    # The gradient of a sum is one number for all pixels.
    ones = torch.ones(1).expand_as(grad)
    result = project_backward(ones, x, weight, (True, True, True))
    expected = project_backward(torch.ones_like(grad), x, weight, (True, True, True))
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize('shape', [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty_maps(shape):
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = torch.ones(7, 3, requires_grad=True), torch.ones(7, requires_grad=True)
    y = project(x, weight, bias)
    assert y.shape == (shape[0], 7, *shape[2:])
    y.sum().backward()
    assert x.grad.shape == shape and not weight.grad.any() and not bias.grad.any()


def test_nan_and_infinity_stay_in_their_pixel():
    x = torch.ones(1, 8, 5, 7)
    x[0, 2, 1, 3], x[0, 5, 4, 6] = float('nan'), float('inf')
    y = project(x, torch.ones(3, 8))
    assert y[0, :, 1, 3].isnan().all() and y[0, :, 4, 6].isinf().all()
    assert y.isfinite().sum() == 3 * 33


def test_second_derivatives():
    x, weight, bias, _ = maps(2, 1, 4, 6, 3, 5, torch.contiguous_format)

    def penalty(apply, *inputs):
        inputs = [each.clone().requires_grad_() for each in inputs]
        grads = torch.autograd.grad(apply(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    expected = penalty(_by_pytorch, *(each.double() for each in (x, weight, bias)))
    for result, right in zip(penalty(project, x, weight, bias), expected):
        torch.testing.assert_close(result.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'arguments, words',
    [
        ((torch.zeros(1, 3, 4, 5), torch.zeros(7, 4), None), 'the weight'),
        ((torch.zeros(3, 4, 5), torch.zeros(7, 3), None), 'the weight'),
        ((torch.zeros(1, 3, 4, 5), torch.zeros(7, 3), torch.zeros(6)), 'bias does not fit'),
        ((torch.zeros(1, 3, 4, 5).double(), torch.zeros(7, 3), None), 'float32'),
    ],
)
def test_the_raw_op_refuses_what_it_cannot_read(arguments, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.sasa_det_native.project(*arguments)


def test_a_wrong_gradient_is_refused():
    with pytest.raises(RuntimeError, match='does not fit the map'):
        torch.ops.sasa_det_native.weight_gradient(torch.zeros(1, 7, 4, 6), torch.zeros(1, 3, 4, 5))


def test_autocast_and_other_types_go_to_pytorch():
    x, weight = nn.Parameter(torch.ones(1, 4, 3, 3)), nn.Parameter(torch.ones(2, 4))
    assert 'Project' in type(project(x, weight).grad_fn).__name__
    with torch.autocast('cpu', torch.bfloat16):
        assert project(x, weight).dtype == torch.bfloat16
    assert project(x.double(), weight.double()).dtype == torch.float64


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    images=st.integers(1, 3),
    inputs=st.sampled_from([3, 16, 400]),
    # Less than a strip, and several.
    height=st.sampled_from([5, 40, 90]),
    width=st.integers(1, 20),
    kernel_size=st.sampled_from([1, 3, 7]),
    has_key=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    border=st.sampled_from(['zeros', 'mask']),
    threads=st.integers(1, 3),
)
def test_attention_by_strips_has_the_bits_of_that_by_operators(
    seed, images, inputs, height, width, kernel_size, has_key, layout, border, threads
):
    outputs = 8 * (2 + has_key)
    x, weight, bias, _ = maps(seed, images, inputs, outputs, height, width, layout)
    tables = maps(seed, 2, kernel_size, 1, 1, 2, torch.contiguous_format)[0].permute(0, 3, 1, 2)
    tables = tables.reshape(2, 2, kernel_size).unsqueeze(1).contiguous()
    options = (kernel_size, 2, 1, border, 0.7, 'native')
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = torch.ops.sasa_det_native.attend(x, weight, bias, *tables, has_key, *options)
    finally:
        torch.set_num_threads(before)
    query, *key, value = project(x, weight, bias).chunk(2 + has_key, 1)
    expected = torch.ops.sasa_det.local_attention(
        query, key[0] if key else None, value, *tables, *options
    )
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize('kernel_size, words', [(2, 'kernel_size'), (-1, 'kernel_size')])
def test_the_raw_layer_refuses_what_the_operator_refuses(kernel_size, words):
    arguments = (torch.zeros(1, 4, 60, 5), torch.zeros(12, 4), None, None, None, True)
    with pytest.raises((RuntimeError, ValueError), match=words):
        torch.ops.sasa_det_native.attend(*arguments, kernel_size, 2, 1, 'zeros', 1.0, 'auto')
    with pytest.raises(RuntimeError, match='not those of 3 projections'):
        torch.ops.sasa_det_native.attend(
            torch.zeros(1, 4, 60, 5),
            torch.zeros(13, 4),
            *arguments[2:],
            3,
            2,
            1,
            'zeros',
            1.0,
            'auto',
        )
