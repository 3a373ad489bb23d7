"""How the operator is differentiated: once by the kernels, further and forward by the reference.

The kernels have no derivative of their backward. Second derivatives, forward-mode derivatives and those that
``torch.func`` maps over a batch are rare, so the slow reference computes them, in the memory that it needs.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from .backends.reference import local_attention_reference
from .window import Window

Inputs = Tuple[Optional[Tensor], ...]
# Of torch.autograd.grad(is_grads_batched=True); versions of torch without this refuse it by themselves.
_is_batched = getattr(torch._C._functorch, 'is_legacy_batchedtensor', lambda grad: False)


def is_transformed(grad: Optional[Tensor] = None) -> bool:
    """Say whether a transform of ``torch.func`` is at work, such as grad, jvp or vmap.

    Args:
        grad: In a backward, the gradient that was given: ``is_grads_batched=True`` maps over it by means of
            its own.

    Examples:
        >>> is_transformed()
        False
    """
    batched = grad is not None and _is_batched(grad)
    return batched or torch._C._are_functorch_transforms_active()


def below_autograd(*args) -> Tuple[Tensor, Tensor]:
    """Call the op out of autograd's sight, with all of its arguments in the order of its schema.

    Returns:
        The output, and the log-sum-exp for the backward.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sasa_det.local_attention.default(*args)


class LocalAttention(torch.autograd.Function):
    """The op; its arguments are those of its schema."""

    @staticmethod
    def forward(*args):
        """Compute the output and the log-sum-exp."""
        return below_autograd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs and the log-sum-exp, not the output: a ReLU in place may well follow."""
        ctx.options = inputs[5:]
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.save_for_forward(*inputs[:5], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        """Give the gradients of the inputs."""
        saved = ctx.saved_tensors
        if _is_batched(grad) and torch.is_grad_enabled():
            # What a Function computes from such a gradient is no part of the graph.
            return *_reference_grads(grad, saved[:5], ctx), *[None] * len(ctx.options)
        # With create_graph, or under torch.func, somebody may differentiate what comes out.
        differentiable = torch.is_grad_enabled() or is_transformed(grad)
        compute = LocalAttentionBackward.apply if differentiable else _kernels_backward
        grads = iter(compute(grad, *saved, *ctx.options))
        of_inputs = [None if x is None else next(grads) for x in saved[:5]]
        return *of_inputs, *[None] * len(ctx.options)

    @staticmethod
    def jvp(ctx, *tangents):
        """Give the tangent of the output."""
        inputs = ctx.saved_tensors[:5]
        return _tangent(_reference(inputs, ctx.options), inputs, tangents), None

    @staticmethod
    def vmap(info, in_dims, *args):
        """Map over a batch, one sample after the other."""
        return _each_sample(LocalAttention, info, in_dims, args)


class LocalAttentionBackward(torch.autograd.Function):
    """The backward of the op, as something that may be differentiated itself."""

    @staticmethod
    def forward(*args):
        """Compute the gradients of the inputs that there are."""
        return _kernels_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the gradient of the output and the inputs."""
        ctx.options = inputs[7:]
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])

    @staticmethod
    def backward(ctx, *cotangents):
        """Give the gradients of the output's gradient and of the inputs."""
        grad, *inputs = ctx.saved_tensors
        present = [x for x in inputs if x is not None]
        with torch.autocast(grad.device.type, enabled=False):
            _, pull_back = torch.func.vjp(_reference_backward(inputs, ctx.options), grad, *present)
            of_grad, *of_present = pull_back(cotangents)
        of_present = iter(of_present)
        of_inputs = [None if x is None else next(of_present) for x in inputs]
        return of_grad, *of_inputs, None, *[None] * len(ctx.options)

    @staticmethod
    def jvp(ctx, *tangents):
        """Give the tangents of the gradients."""
        saved = ctx.saved_tensors
        return _tangent(_reference_backward(saved[1:], ctx.options), saved, tangents)

    @staticmethod
    def vmap(info, in_dims, *args):
        """Map over a batch, one sample after the other."""
        return _each_sample(LocalAttentionBackward, info, in_dims, args)


def _kernels_backward(grad, query, key, value, rel_row, rel_col, logsumexp, *options) -> tuple:
    inputs = (query, key, value, rel_row, rel_col)
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.sasa_det.local_attention_backward.default(
            grad, *inputs, logsumexp, *options
        )
    return tuple(result for result, x in zip(grads, inputs) if x is not None)


def _reference(inputs: Inputs, options: tuple) -> Callable[..., Tensor]:
    """Make a function of those inputs that there are."""

    def compute(*present):
        present = iter(present)
        filled = (None if x is None else next(present) for x in inputs)
        return local_attention_reference(*filled, Window.of_op(*options))

    return compute


def _reference_backward(inputs: Inputs, options: tuple) -> Callable[..., tuple]:
    """Make a function of the output's gradient and of those inputs that there are."""

    def compute(grad, *present):
        return torch.func.vjp(_reference(inputs, options), *present)[1](grad)

    return compute


def _reference_grads(grad: Tensor, inputs: Inputs, ctx) -> list:
    """Compute the gradients of the inputs that need one by operations that autograd sees."""
    needed = ctx.needs_input_grad[:5]
    # Views: query, key and value may be one tensor, and have a gradient each.
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    with torch.autocast(grad.device.type, enabled=False):
        output = _reference(inputs, ctx.options)(*(x for x in inputs if x is not None))
        wanted = [x for x, need in zip(inputs, needed) if need]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needed]


def _tangent(compute: Callable, primals: Inputs, tangents: Inputs):
    """Give the directional derivative of a function, as the transpose of its backward, which is linear."""
    pairs = [(x, tangent) for x, tangent in zip(primals, tangents) if x is not None]
    given = tuple(torch.zeros_like(x) if tangent is None else tangent for x, tangent in pairs)
    with torch.autocast(given[0].device.type, enabled=False):
        output, pull_back = torch.func.vjp(compute, *(x for x, _ in pairs))
        zeros = (
            torch.zeros_like(output)
            if isinstance(output, Tensor)
            else tuple(map(torch.zeros_like, output))
        )
        _, transposed = torch.func.vjp(pull_back, zeros)
        return transposed(given)[0]


def _each_sample(function, info, in_dims, args):
    """Call a function for each sample of a batch, and stack what it gives."""

    def select(x, dim, index):
        if dim is None or not isinstance(x, Tensor):
            return x
        if not info.batch_size:  # a sample of any content says which shapes there are none of
            return x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :])
        return x.select(dim, index)

    samples = [
        function.apply(*(select(x, dim, index) for x, dim in zip(args, in_dims)))
        for index in range(max(1, info.batch_size))
    ]
    results = tuple(torch.stack(each)[: info.batch_size] for each in zip(*samples))
    return results, (0,) * len(results)
