"""Projection and attention in one autograd Function, which saves the input but no projection."""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from ..ops import local_attention
from ..ops.autograd import below_autograd, is_transformed
from ..ops.huge_pages import with_huge_pages
from ..ops.torch_library import ATTEND_BACKWARD_INTO, is_autocast_enabled
from ..ops.window import empty_output

# In the order of the op's schema.
_OPTIONS = ('kernel_size', 'num_heads', 'dilation', 'border', 'scale', 'backend')


# torch.fx and other tensor-likes see one call, and not the choices, which read what only a tensor knows.
@wrap_torch_function(lambda x, *_, **__: (x,))
def project(
    x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, out: Optional[Tensor] = None
) -> Tensor:
    """Project every pixel's channels, as a 1x1 convolution does.

    Args:
        x: (B, in_channels, H, W).
        weight: (out_channels, in_channels).
        bias: (out_channels,), or None.
        out: A contiguous tensor for the result, outside of autograd. Only if x is a contiguous map on the
            CPU.

    Returns:
        (B, out_channels, H, W).

    Examples:
        >>> project(torch.zeros(2, 8, 4, 5), torch.zeros(16, 8)).shape
        torch.Size([2, 16, 4, 5])
    """
    if not _is_one_product(x):
        return F.conv2d(x, weight[:, :, None, None], bias)
    weight = weight.expand(x.shape[0], -1, -1)
    flat = x.flatten(2)
    to = {} if out is None else dict(out=out.flatten(2))
    if bias is None:
        y = torch.bmm(weight, flat, **to)
    else:
        y = torch.baddbmm(bias[:, None], weight, flat, **to)
    return y.unflatten(2, x.shape[2:])


def _is_one_product(x: Tensor) -> bool:
    # On the CPU one matrix product per image is faster than oneDNN's 1x1 convolution.
    return x.is_cpu and x.is_contiguous()


@wrap_torch_function(lambda x, *_, **__: (x,))
def projected_attention(
    x: Tensor,
    weights: List[Tensor],
    biases: List[Optional[Tensor]],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    **options,
) -> Tensor:
    """Attend with queries, keys and values that are projections of one map.

    One projection computes all three, so x is read once. The backward projects again. Kept until
    then, the projections would take three times the memory of x, which is all that a convolution
    keeps.

    Args:
        x: (B, in_channels, H, W).
        weights: (out_channels, in_channels) of query, key and value, or of query and value.
        biases: (out_channels,) or None for each.
        rel_row: See :func:`sasa_det.ops.local_attention`.
        rel_col: The same.
        options: All options of local_attention, by name.

    Returns:
        (B, out_channels, H, W).

    Raises:
        ValueError: x is not (B, in_channels, H, W).
        TypeError: x is not of the type of the weights, outside autocast.

    Examples:
        >>> x, weights = torch.randn(2, 8, 4, 5), [torch.randn(8, 8) for _ in range(3)]
        >>> options = dict(kernel_size=3, num_heads=2, dilation=1, border='zeros', scale=1.0)
        >>> projected_attention(x, weights, [None] * 3, None, None, **options, backend='auto').shape
        torch.Size([2, 8, 4, 5])
    """
    check_map(x, weights[0].shape[1], weights[0].dtype)
    weight = torch.cat(weights)
    bias = None
    if any(each is not None for each in biases):
        zeros = torch.zeros(len(weights[0]), dtype=weight.dtype, device=weight.device)
        bias = torch.cat([zeros if each is None else each for each in biases])
    inputs = (x, weight, bias, rel_row, rel_col)
    # Tracers, compilers and transforms do not see into an autograd.Function, nor into an `out=`.
    dual = torch.autograd.forward_ad._current_level >= 0
    followed = torch.jit.is_tracing() or _is_compiling() or is_transformed() or dual
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if learns and not followed and options['backend'] != 'reference':
        return _ProjectedAttention.apply(*inputs, len(weights), options)
    y = (project if followed or learns else _project_anew)(x, weight, bias)
    query, key, value = _split(y, len(weights))
    return local_attention(query, key, value, rel_row, rel_col, **options)


def check_map(x: Tensor, in_channels: int, dtype: Optional[torch.dtype] = None) -> None:
    """Raise a ValueError if x is not (B, in_channels, H, W), a TypeError if it is not of the weights' type."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f'a local attention of in_channels={in_channels} takes (B, {in_channels}, H, W), '
            f'but was given {tuple(x.shape)}'
        )
    if dtype is None or x.dtype == dtype:
        return
    # Autocast casts floating-point numbers, except for float64.
    cast = x.is_floating_point() and torch.float64 not in (x.dtype, dtype)
    if not (cast and is_autocast_enabled(x.device.type)):
        raise TypeError(
            f'a local attention with weights in {dtype} takes that type, but was given {x.dtype}; '
            f'cast one of them, such as by x.to({dtype}), or run it in torch.autocast'
        )


def _project_anew(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Project as `project` does, outside of autograd, and into huge pages where that is faster."""
    # torch < 2.4 cannot count the FLOPs of an `out=`, and has other names for autocast's state.
    if not hasattr(torch, 'get_autocast_dtype') or torch.is_autocast_enabled('cpu'):
        return project(x, weight, bias)
    if not _is_one_product(x):
        return project(x, weight, bias)
    out = with_huge_pages(x.new_empty(x.shape[0], len(weight), *x.shape[2:]))
    return project(x, weight, bias, out)


def _project_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: Tuple[bool, ...]) -> list:
    """Compute the gradients of `project`'s x, weight and bias; None for those not needed."""
    if not _is_one_product(x):
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight[:, :, None, None], [len(weight)],
            [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(wanted),
        )  # fmt: skip
        return [grads[0], None if grads[1] is None else grads[1].view_as(weight), grads[2]]
    flat, grad = x.flatten(2), grad.flatten(2)
    back = weight.t().expand(x.shape[0], -1, -1)
    return [
        torch.bmm(back, grad).view_as(x) if wanted[0] else None,
        torch.bmm(grad, flat.transpose(1, 2)).sum(0) if wanted[1] else None,
        grad.sum((0, 2)) if wanted[2] else None,
    ]


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
        y = _project_anew(x, weight, bias)
        ctx.options = tuple(options[name] for name in _OPTIONS)
        inputs = (*_split(y, parts), rel_row, rel_col)
        output, logsumexp = below_autograd(*inputs, *ctx.options)
        ctx.save_for_backward(x, weight, bias, rel_row, rel_col, logsumexp)
        ctx.parts = parts
        ctx.dtypes = y.dtype, output.dtype  # autocast may have changed either
        return output

    @staticmethod
    def backward(ctx, grad):
        *inputs, logsumexp = ctx.saved_tensors
        x_dtype, map_dtype = ctx.dtypes
        # With create_graph, or under torch.func, somebody may differentiate what comes out.
        if torch.is_grad_enabled() or is_transformed(grad):
            return *_differentiable_grads(ctx, grad, inputs), None, None
        with torch.autocast(grad.device.type, enabled=False):
            x, weight, bias = (_to(each, x_dtype) for each in inputs[:3])
            y = _project_anew(x, weight, bias).to(map_dtype)
            # One tensor for queries, keys and values, as the projection's backward takes it.
            grad_y = empty_output(y)
            tables = ATTEND_BACKWARD_INTO(
                grad,
                *_split(y, ctx.parts),
                *(_to(each, map_dtype) for each in inputs[3:]),
                logsumexp,
                *_split(grad_y, ctx.parts),
                *ctx.options,
            )
            del y
            wanted = ctx.needs_input_grad[:3]
            projected = _project_backward(grad_y.to(x_dtype), x, weight, wanted)
        grads = (*projected, *tables)
        return (
            *(g.to(each.dtype) if each is not None and needed else None
              for each, needed, g in zip(inputs, ctx.needs_input_grad, grads)),
            None,
            None,
        )  # fmt: skip


def _differentiable_grads(
    ctx, grad: Tensor, inputs: List[Optional[Tensor]]
) -> List[Optional[Tensor]]:
    """Compute the gradients of a projected attention's inputs by operations that autograd sees."""
    x_dtype, map_dtype = ctx.dtypes
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        y = project(*(_to(each, x_dtype) for each in inputs[:3])).to(map_dtype)
        tables = (_to(each, map_dtype) for each in inputs[3:])
        output = local_attention(*_split(y, ctx.parts), *tables, **dict(zip(_OPTIONS, ctx.options)))
        wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad) if needed]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:5]]


def _to(x: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    return None if x is None else x.to(dtype)
