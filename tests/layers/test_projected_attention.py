"""Recomputed projections: the same gradients as kept ones, for the memory of the input alone."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.layers.projection import project_by
from sasa_det.ops import local_attention


def attend_in_steps(layer, x):
    """Compute what the layer computes, by autograd's own means."""
    query, key, value = (
        None if each is None else project_by(each, x)
        for each in (layer.query, layer.key, layer.value)
    )
    return local_attention(
        query, key, value, layer.rel_row, layer.rel_col,
        kernel_size=layer.kernel_size, num_heads=layer.num_heads, border=layer.border,
        backend=layer.backend,
    )[:, :, :: layer.stride, :: layer.stride]  # fmt: skip


def grads(function, layer, x, cotangent):
    """Return the gradients of the input and of all parameters."""
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    return torch.autograd.grad(function(leaves[0]), leaves, cotangent)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(
    'position, logits', [('relative', 'qk+qr'), ('relative', 'qr'), ('none', 'qk')]
)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('stride, keep', [(1, False), (2, False), (2, True), (3, False)])
def test_gradients_are_autograds(bias, position, logits, layout, stride, keep):
    """Of a stride's pixels, those of attention everywhere of which only these pixels are kept."""
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(
        12, 16, 3, num_heads=4, bias=bias, position=position, logits=logits, border='mask',
        stride=stride, downsample='query', keep_projections=keep,
    ).double()  # fmt: skip
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 12, 7, 9, dtype=torch.float64).contiguous(memory_format=layout)
    cotangent = torch.randn(2, 16, -(-7 // stride), -(-9 // stride), dtype=torch.float64)
    expected = grads(lambda x: attend_in_steps(layer, x), layer, x, cotangent)
    for result, truth in zip(grads(layer, layer, x, cotangent), expected):
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('learns', [True, False])
def test_a_map_of_one_pixel_stays_contiguous(learns):
    """In torch 2.2 the backward of group_norm takes no other."""
    layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=2).requires_grad_(learns)
    assert layer(torch.randn(2, 8, 1, 1)).stride() == (8, 1, 1, 1)


def test_frozen_parameters_and_inputs_get_none():
    layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=2, bias=True)
    layer.value.requires_grad_(False)
    x = torch.randn(1, 8, 5, 5)
    layer(x).sum().backward()
    assert layer.value.weight.grad is None and x.grad is None
    assert layer.query.weight.grad.abs().sum() > 0 and layer.rel_row.grad.abs().sum() > 0
    layer.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize('learns', [True, False])
def test_vmap_sees_through_it(learns):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=2)
    x = torch.randn(3, 2, 8, 5, 6)
    with torch.set_grad_enabled(learns):
        result, truth = torch.func.vmap(layer)(x), torch.stack([layer(y) for y in x])
    torch.testing.assert_close(result, truth)
    if learns:
        leaves, cotangent = list(layer.parameters()), torch.randn_like(truth)
        expected = torch.autograd.grad(truth, leaves, cotangent)
        for grad, own in zip(torch.autograd.grad(result, leaves, cotangent), expected):
            torch.testing.assert_close(grad, own, rtol=1e-4, atol=1e-4)


def test_autocast_computes_low_and_gives_the_parameters_types():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(16, kernel_size=5, num_heads=2, bias=True)
    x = torch.randn(2, 16, 9, 9)
    cotangent = torch.randn(2, 16, 9, 9)

    def low(function):
        def run(x):
            with torch.autocast('cpu', torch.bfloat16):
                output = function(x)
            assert output.dtype == torch.bfloat16
            return output

        return grads(run, layer, x, cotangent.bfloat16())

    expected = low(lambda x: attend_in_steps(layer, x))
    for result, truth in zip(low(layer), expected):
        assert result.dtype == torch.float32
        assert (result - truth).norm() <= 0.02 * truth.norm()


def kept_bytes(layer, x):
    """The memory that a layer keeps for its backward."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def test_training_keeps_the_input_and_no_projection():
    layer = LocalSelfAttention2d(32, kernel_size=3, num_heads=4)
    x = torch.randn(1, 32, 40, 40, requires_grad=True)
    # The input, the projections' weights, and the logarithm of the sum of exponentials of each head.
    assert kept_bytes(layer, x) <= 1.2 * x.nbytes


@pytest.mark.parametrize('stride', [2, 3])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('has_key', [True, False])
def test_float32_gradients_of_a_stride_are_those_of_attention_everywhere(stride, layout, has_key):
    """By the C++ projections, of a map of several strips."""
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(
        24, 16, 5, num_heads=2, bias=True, logits='qk+qr' if has_key else 'qr', stride=stride,
        downsample='query',
    )  # fmt: skip
    x = torch.randn(2, 24, 75, 31).contiguous(memory_format=layout)
    with torch.no_grad():
        output, truth = layer(x), attend_in_steps(layer, x)
    assert output.is_contiguous(memory_format=layout)
    torch.testing.assert_close(output, truth, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(output)
    expected = grads(lambda x: attend_in_steps(layer, x), layer, x, cotangent)
    for result, truth in zip(grads(layer, layer, x, cotangent), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item())


def test_gradients_of_gradients_of_a_stride():
    torch.manual_seed(0)
    found = []
    layer = LocalSelfAttention2d(
        4, kernel_size=3, num_heads=2, bias=True, stride=2, downsample='query'
    )
    layer.double()
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64)
    for function in (layer, lambda x: attend_in_steps(layer, x)):
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *layer.parameters()]
        first = torch.autograd.grad(function(leaf).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    for result, truth in zip(*found, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('learns', [True, False])
def test_a_stride_has_the_same_bits_at_any_thread_count(learns):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(24, 16, 7, num_heads=2, stride=2, downsample='query')
    x, threads = torch.randn(1, 24, 150, 40), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            with torch.set_grad_enabled(learns):
                output = layer(x)
                found = grads(layer, layer, x, torch.ones_like(output)) if learns else ()
            results.append((output.detach(), *found))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_stride_keeps_no_more_than_the_input_and_a_quarter_of_the_logsumexp():
    layer = LocalSelfAttention2d(32, kernel_size=3, num_heads=4, stride=2, downsample='query')
    x = torch.randn(1, 32, 40, 40, requires_grad=True)
    logsumexp, weights = 4 * 4 * 20 * 20, 4 * sum(each.numel() for each in layer.parameters())
    assert kept_bytes(layer, x) == x.nbytes + logsumexp + weights


def test_flops_of_a_layer_with_a_stride_are_counted():
    """Queries and attention at a quarter of the pixels, keys and values at all."""
    layer = LocalSelfAttention2d(16, kernel_size=3, num_heads=2, stride=2, downsample='query')
    for size in ((6, 8), (100, 8)):  # by operators, and by strips
        x = torch.randn(1, 16, *size)
        projections, attention = (16 + 4 * 2 * 16) / 4, (9 + 9 + 3) / 4
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        assert counter.get_total_flops() == 2 * x.numel() * (projections + attention)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        backward = 2 * projections + (9 + 3) / 4 + 2 * attention
        expected = 2 * x.numel() * (projections + attention + backward)
        assert counter.get_total_flops() == expected


def test_flops_of_a_layer_are_counted():
    """Multiply-adds, each two FLOPs: a 3 x 3 window takes 9 for q.k, 9 for values and 3 for q.r."""
    layer, x = LocalSelfAttention2d(16, kernel_size=3, num_heads=2), torch.randn(1, 16, 6, 7)
    projections, attention = 3 * 16, 9 + 9 + 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * x.numel() * (projections + attention)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    # The backward projects again, recomputes the logits, and takes two products for each of the forward's;
    # of the projections one, for their weights, as the input learns nothing.
    backward = projections + (9 + 3) + 2 * attention + projections
    assert counter.get_total_flops() == 2 * x.numel() * (projections + attention + backward)
