"""Derivatives beyond the first backward, in every form that torch has: those of the reference, or refused."""

import pytest
import torch
from cases import Case, backends
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import local_attention

fused = backends('eager', 'native')
CASES = [
    Case(kernel_size=3, size=(4, 5), num_heads=2, depth=4, batch=1, key=key, positions=positions, border=border)
    for key, positions, border in (
        (True, 'shared', 'zeros'), (True, 'per_head', 'mask'), (True, None, 'mask'), (False, 'shared', 'zeros')
    )
]  # fmt: skip
CASES.append(
    Case(kernel_size=3, size=(4, 5), num_heads=2, depth=4, batch=1, stride=2, border='mask')
)


def operator(case, backend, inputs):
    """The operator as a function of those inputs that there are."""
    present = [x for x in inputs if x is not None]

    def compute(*tensors):
        tensors = iter(tensors)
        filled = (None if x is None else next(tensors) for x in inputs)
        return local_attention(*filled, **case.options, backend=backend)

    return compute, present


def penalty(compute, tensors):
    """A loss of gradients, and its gradients: beside the operator each input has a path of its own."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    y = compute(*tensors)
    loss = y.square().sum() + sum(x.pow(3).sum() for x in tensors)
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    return torch.autograd.grad(sum(g.norm() for g in grads), tensors)


@fused
@pytest.mark.parametrize('case', CASES, ids=str)
def test_gradients_of_gradients_are_the_references(case, backend):
    inputs = case.inputs(torch.float64)
    ours, truth = (penalty(*operator(case, name, inputs)) for name in (backend, 'reference'))
    for result, expected in zip(ours, truth, strict=True):
        assert torch.allclose(result, expected, rtol=1e-9, atol=1e-10)


@fused
def test_gradgradcheck(backend):
    case = Case(kernel_size=3, size=(2, 3), num_heads=1, depth=2, batch=1)
    compute, present = operator(case, backend, case.inputs(torch.float64))
    present = [x.detach().requires_grad_() for x in present]
    assert torch.autograd.gradgradcheck(compute, present)


@fused
@pytest.mark.parametrize('case', CASES, ids=str)
def test_third_derivatives(case, backend):
    """By finite differences of what gradients of gradients give."""
    compute, present = operator(case, backend, case.inputs(torch.float64))
    x, direction = present[0], torch.randn_like(present[0])

    def second(x):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(compute(x, *present[1:]).pow(2).sum(), x, create_graph=True)
        return x, torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]

    leaf, value = second(x)
    (ours,) = torch.autograd.grad(value, leaf, direction)
    step = 1e-5
    ahead, behind = (second(x + sign * step * direction)[1].detach() for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    # The third derivative is symmetric: along a direction it is the product with it.
    assert torch.allclose(ours, slope, rtol=1e-4, atol=1e-4 * slope.abs().max().item())


class Block(nn.Module):
    """The layer with a residual path beside it, along which a wrong derivative stays unseen."""

    def __init__(self, backend, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = LocalSelfAttention2d(8, kernel_size=3, num_heads=2, backend=backend, **options)

    def forward(self, x):
        return x + self.layer(x)


@fused
@pytest.mark.parametrize(
    'options', [dict(bias=True), dict(logits='qr'), dict(position='none', out_proj=True)]
)
class TestLayer:
    def test_gradient_penalty(self, backend, options):
        x = torch.randn(1, 8, 4, 5, dtype=torch.float64)
        results = []
        for name in (backend, 'reference'):
            block = Block(name, **options).double()
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad(g.norm(), [leaf, *block.parameters()]))
        for ours, truth in zip(*results, strict=True):
            assert torch.allclose(ours, truth, rtol=1e-9, atol=1e-10)

    def test_functional_hessian(self, backend, options):
        x = torch.randn(1, 8, 1, 2, dtype=torch.float64)
        ours, truth = (
            torch.autograd.functional.hessian(lambda x, b=b: b(x).pow(3).sum(), x)
            for b in (Block(name, **options).double() for name in (backend, 'reference'))
        )
        assert torch.allclose(ours, truth, rtol=1e-9, atol=1e-10)

    def test_torch_func(self, backend, options):
        x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
        direction = torch.randn_like(x)
        found = []
        for block in (Block(name, **options).double() for name in (backend, 'reference')):
            loss = lambda x, b=block: b(x).pow(2).sum()  # noqa: E731
            found.append(
                [
                    grad(loss)(x),
                    grad(lambda x, f=loss: grad(f)(x).pow(2).sum())(x),
                    jvp(loss, (x,), (direction,))[1],
                    jacrev(block)(x),
                    jacfwd(block)(x),
                    jvp(grad(loss), (x,), (direction,))[1],
                ]
            )
        for ours, truth in zip(*found, strict=True):
            assert torch.allclose(ours, truth, rtol=1e-9, atol=1e-10)

    def test_gradients_per_sample(self, backend, options):
        x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
        block = Block(backend, **options).double()
        parameters = {name: p.detach() for name, p in block.named_parameters()}

        def loss(parameters, sample):
            return functional_call(block, parameters, (sample[None],)).pow(2).sum()

        ours = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        for index, sample in enumerate(x):
            block.zero_grad()
            block(sample[None]).pow(2).sum().backward()
            for name, parameter in block.named_parameters():
                assert torch.allclose(ours[name][index], parameter.grad, rtol=1e-9, atol=1e-10)


@fused
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
def test_forward_mode(mode, backend):
    case = Case(kernel_size=3, size=(4, 5))
    query, *others = case.inputs(torch.float64)
    direction = torch.randn_like(query)
    tangents = []
    with forward_ad.dual_level(), mode():
        dual = forward_ad.make_dual(query, direction)
        for name in (backend, 'reference'):
            output = local_attention(dual, *others, **case.options, backend=name)
            tangents.append(forward_ad.unpack_dual(output).tangent)
    assert torch.allclose(*tangents, rtol=1e-9, atol=1e-10)


def test_under_autocast():
    """torch.func's gradient is that of a backward, in the type that autocast chooses."""
    x = torch.randn(1, 8, 4, 5)
    layer = Block('native').layer
    with torch.autocast('cpu', dtype=torch.bfloat16):
        leaf = x.clone().requires_grad_()
        (truth,) = torch.autograd.grad(layer(leaf).float().pow(2).sum(), leaf)
        ours = grad(lambda x: layer(x).float().pow(2).sum())(x)
    assert ours.dtype == truth.dtype == torch.float32
    assert torch.allclose(ours, truth, rtol=0.05, atol=0.05)


@fused
@pytest.mark.parametrize('hooked', [False, True])
def test_a_backward_within_autocast(backend, hooked):
    """As `loss.backward()` inside of the `with` has it; the forward's cast does not reach it."""
    x = torch.randn(1, 8, 4, 5)
    layer = Block(backend).layer
    if hooked:
        layer.value.register_forward_hook(lambda module, args, output: output)
    grads = []
    for enabled in (True, False):
        leaf = x.clone().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(
                layer(leaf).float().pow(2).sum(), leaf, create_graph=True
            )
            (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        grads.append((first.detach(), second))
    for ours, truth in zip(*grads, strict=True):
        assert torch.allclose(ours, truth, rtol=0.1, atol=0.1 * truth.abs().max().item())


@fused
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
def test_forward_mode_through_a_layer(mode, backend):
    x, direction = torch.randn(2, 1, 8, 4, 5, dtype=torch.float64)
    tangents = []
    for name in (backend, 'reference'):
        layer = Block(name, bias=True).double()
        with forward_ad.dual_level(), mode():
            output = layer(forward_ad.make_dual(x, direction))
            tangents.append(forward_ad.unpack_dual(output).tangent)
    assert torch.allclose(*tangents, rtol=1e-9, atol=1e-10)


def of_each(compute, tensors, vectors, batched, **options):
    """The gradients for some output gradients: of all of them at once, or of one after the other."""
    y = compute(*tensors)
    if batched:
        return torch.autograd.grad(y, tensors, vectors, is_grads_batched=True, **options)
    each = [torch.autograd.grad(y, tensors, v, retain_graph=True, **options) for v in vectors]
    return [torch.stack(grads) for grads in zip(*each)]


@fused
@pytest.mark.parametrize('kind', ['operator', 'one tensor', 'layer'])
def test_gradients_of_many_outputs_at_once(kind, backend):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` computes them."""
    torch.manual_seed(0)
    case = Case(kernel_size=3, size=(3, 4), num_heads=2, depth=2, batch=1, positions='shared')
    inputs = case.inputs(torch.float64)
    layer = LocalSelfAttention2d(4, 4, kernel_size=3, num_heads=2, backend=backend).double()
    compute, tensors = {
        'operator': operator(case, backend, inputs),
        'one tensor': (
            lambda x: local_attention(x, x, x, **case.options, backend=backend),
            inputs[:1],
        ),
        'layer': (lambda x, *_: layer(x), inputs[:1]),
    }[kind]
    tensors = [x.detach().requires_grad_() for x in tensors]
    if kind == 'layer':
        tensors += layer.parameters()
    vectors = torch.randn(3, 1, 4, 3, 4, dtype=torch.float64)
    ours, truth = (of_each(compute, tensors, vectors, batched) for batched in (True, False))
    for result, expected in zip(ours, truth, strict=True):
        assert torch.allclose(result, expected, rtol=1e-9, atol=1e-10)
    ours, truth = (
        torch.autograd.grad(
            sum(
                g.square().sum()
                for g in of_each(compute, tensors, vectors, batched, create_graph=True)
            ),
            tensors,
        )
        for batched in (True, False)
    )
    for result, expected in zip(ours, truth, strict=True):
        assert torch.allclose(result, expected, rtol=1e-9, atol=1e-10)


@fused
def test_a_batch_of_no_samples(backend):
    layer = LocalSelfAttention2d(4, 8, kernel_size=3, num_heads=2, backend=backend)
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return functional_call(layer, weights, (x,)).square().sum()

    none = torch.zeros(0, 1, 4, 3, 5)
    assert vmap(layer)(none).shape == (0, 1, 8, 3, 5)
    grads = vmap(grad(loss), in_dims=(None, 0))(weights, none)
    assert {name: each.shape for name, each in grads.items()} == {
        name: (0, *weight.shape) for name, weight in weights.items()
    }
