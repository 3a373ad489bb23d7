"""Projection and attention in one, which keep the input for the backward and nothing projected."""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import local_attention


def project(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Project every pixel's channels, as a 1x1 convolution does.

    Args:
        x: (B, in_channels, H, W).
        weight: (out_channels, in_channels).
        bias: (out_channels,), or None.

    Returns:
        (B, out_channels, H, W).

    Examples:
        >>> project(torch.zeros(2, 8, 4, 5), torch.zeros(16, 8)).shape
        torch.Size([2, 16, 4, 5])
    """
    if not x.is_cpu or not x.is_contiguous():
        return F.conv2d(x, weight[:, :, None, None], bias)
    # On the CPU one matrix product an image is faster than oneDNN's 1x1 convolution.
    weight = weight.expand(x.shape[0], -1, -1)
    flat = x.flatten(2)
    y = torch.bmm(weight, flat) if bias is None else torch.baddbmm(bias[:, None], weight, flat)
    return y.unflatten(2, x.shape[2:])


def projected_attention(
    x: Tensor,
    weights: List[Tensor],
    biases: List[Optional[Tensor]],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    **options,
) -> Tensor:
    """Attend with queries, keys and values that are projections of one map.

    They are projected at once, which reads x once, and again in the backward: kept until then they
    would take three times the memory of x, which is all that a convolution keeps.

    Args:
        x: (B, in_channels, H, W).
        weights: (out_channels, in_channels) of query, key and value, or of query and value.
        biases: (out_channels,) or None for each.
        rel_row: See :func:`sasa_det.ops.local_attention`.
        rel_col: The same.
        options: All of local_attention's, by name.

    Returns:
        (B, out_channels, H, W).

    Examples:
        >>> x, weights = torch.randn(2, 8, 4, 5), [torch.randn(8, 8) for _ in range(3)]
        >>> options = dict(kernel_size=3, num_heads=2, dilation=1, border='zeros', scale=1.0)
        >>> projected_attention(x, weights, [None] * 3, None, None, **options, backend='auto').shape
        torch.Size([2, 8, 4, 5])
    """
    weight = torch.cat(weights)
    bias = None
    if any(each is not None for each in biases):
        zeros = torch.zeros(len(weights[0]), dtype=weight.dtype, device=weight.device)
        bias = torch.cat([zeros if each is None else each for each in biases])
    inputs = (x, weight, bias, rel_row, rel_col)
    if (
        not torch.is_grad_enabled()
        or not any(each is not None and each.requires_grad for each in inputs)
        or options['backend'] == 'reference'
        # What follows a graph through does not see into an autograd.Function.
        or torch.jit.is_tracing()
        or _is_compiling()
    ):
        query, key, value = _split(project(x, weight, bias), len(weights))
        return local_attention(query, key, value, rel_row, rel_col, **options)
    return _ProjectedAttention.apply(*inputs, len(weights), options)


def _split(y: Tensor, parts: int) -> tuple:
    maps = y.chunk(parts, 1)
    return maps if parts == 3 else (maps[0], None, maps[1])


def _is_compiling() -> bool:
    if hasattr(torch, 'compiler') and hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    return torch._dynamo.is_compiling()  # torch < 2.3


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rel_row, rel_col, parts, options):
        y = project(x, weight, bias)
        # Options in the order of the op's schema.
        ctx.options = tuple(
            options[name]
            for name in ('kernel_size', 'num_heads', 'dilation', 'border', 'scale', 'backend')
        )
        output, logsumexp = torch.ops.sasa_det.local_attention(
            *_split(y, parts), rel_row, rel_col, *ctx.options
        )
        ctx.save_for_backward(x, weight, bias, rel_row, rel_col, logsumexp)
        ctx.parts = parts
        ctx.dtypes = y.dtype, output.dtype  # autocast may have changed either
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *inputs, logsumexp = ctx.saved_tensors
        wanted = [
            None if each is None else each.detach().requires_grad_(needed)
            for each, needed in zip(inputs, ctx.needs_input_grad)
        ]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            x, weight, bias = (_to(each, ctx.dtypes[0]) for each in wanted[:3])
            maps = _split(project(x, weight, bias).to(ctx.dtypes[1]), ctx.parts)
        tables = [_to(each, ctx.dtypes[1]) for each in inputs[3:]]
        grads = torch.ops.sasa_det.local_attention_backward(
            grad, *(_to(each, None) for each in maps), *tables, logsumexp, *ctx.options
        )
        leaves = [each for each in wanted[:3] if each is not None and each.requires_grad]
        pairs = [(m, g) for m, g in zip(maps, grads) if m is not None and m.requires_grad]
        found = iter(
            torch.autograd.grad([m for m, _ in pairs], leaves, [g for _, g in pairs])
            if leaves
            else ()
        )
        projected = (
            next(found) if each is not None and each.requires_grad else None for each in wanted[:3]
        )
        tables = (
            None if each is None else g.to(each.dtype) for each, g in zip(inputs[3:], grads[3:])
        )
        return (*projected, *tables, None, None)


def _to(x: Optional[Tensor], dtype: Optional[torch.dtype]) -> Optional[Tensor]:
    """Convert what is there; with no type, take it out of the graph."""
    if x is None:
        return None
    return x.detach() if dtype is None else x.to(dtype)
