"""Projection and attention in one autograd Function, which saves the input but no projection."""

from typing import List, Optional

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

from ..ops import local_attention
from ..ops.autograd import below_autograd, is_transformed
from ..ops.backends.choice import logs_choices
from ..ops.native_library import load
from ..ops.project import is_followed, project, project_backward, takes
from ..ops.torch_library import ATTEND_BACKWARD_INTO, is_autocast_enabled
from ..ops.window import empty_output, strided, strided_copy

# On a GPU, all that follows in C++: csrc/gpu_layer.cpp. It gives None for what it leaves to Python.
_ON_GPU = None if load()[0] is None else torch.ops.sasa_det_cuda.projected_attention.default
# In the order of the op's schema.
_OPTIONS = ('kernel_size', 'num_heads', 'dilation', 'border', 'scale', 'backend', 'stride')


@wrap_torch_function(lambda x, *_, **__: (x,))
def projected_attention(
    x: Tensor,
    weights: List[Tensor],
    biases: List[Optional[Tensor]],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    *,
    keep: bool = False,
    **options,
) -> Tensor:
    """Attend with queries, keys and values that are projections of one map.

    One projection computes all three, so x is read once. With a stride, queries are projections of the pixels
    that it leaves, and keys and values those of all. The backward projects again unless they are kept. Kept
    until then, the projections take three times the memory of x, which is all that a convolution keeps.

    Args:
        x: (B, in_channels, H, W).
        weights: (out_channels, in_channels) of query, key and value, or of query and value.
        biases: (out_channels,) or None for each.
        rel_row: See :func:`sasa_det.ops.local_attention`.
        rel_col: The same.
        keep: Keep the projections for the backward, which then does not project again.
        options: All options of local_attention, by name.

    Returns:
        (B, out_channels, ceil(H / stride), ceil(W / stride)).

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
    options = {'stride': 1, **options}
    # The backend's name is for tests, where the CPU stands in for a GPU.
    on_gpu = _ON_GPU is not None and (x.is_cuda or options['backend'] == 'cuda')
    if on_gpu and not is_followed() and not logs_choices():
        *given, stride = (options[name] for name in _OPTIONS)
        # These kernels have no stride: they attend at every pixel.
        output = _ON_GPU(x, weights, biases, rel_row, rel_col, *given, keep)
        if output is not None:
            return strided_copy(output, stride)
    weight = torch.cat(weights)
    bias = None
    if any(each is not None for each in biases):
        zeros = torch.zeros(len(weights[0]), dtype=weight.dtype, device=weight.device)
        bias = torch.cat([zeros if each is None else each for each in biases])
    inputs = (x, weight, bias, rel_row, rel_col)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if learns and options['backend'] != 'reference' and not is_followed():
        return _ProjectedAttention.apply(*inputs, len(weights), keep, options)
    if not learns and not is_followed() and _is_one_call(x, weight, bias, options['backend']):
        chosen = (options[name] for name in _OPTIONS)
        tables = (rel_row, rel_col)
        return torch.ops.sasa_det_native.attend(
            x, weight, bias, *tables, len(weights) == 3, *chosen
        )[0]
    maps = _split(_project(x, weight, bias, len(weights), options['stride']), len(weights))
    return local_attention(*maps, rel_row, rel_col, **options)


@wrap_torch_function(lambda x, *_, **__: (x,))
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


def _is_one_call(x: Tensor, weight: Tensor, bias: Optional[Tensor], backend: str) -> bool:
    # In C++ a few rows are projected at a time, so that Q, K and V stay in a cache.
    return backend in ('auto', 'native') and takes(x, weight, bias)


def _projections(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], parts: int, stride: int
) -> list:
    """List what is projected together, by what: without a stride all, else the queries before the others."""
    if stride == 1:
        return [(x, weight, bias)]
    channels = len(weight) // parts
    weights = weight[:channels], weight[channels:]
    biases = (None, None) if bias is None else (bias[:channels], bias[channels:])
    return list(zip((strided_copy(x, stride), x), weights, biases))


def _project(x: Tensor, weight: Tensor, bias: Optional[Tensor], parts: int, stride: int) -> list:
    return [project(*each) for each in _projections(x, weight, bias, parts, stride)]


def _split(projected: List[Tensor], parts: int) -> tuple:
    """View query, key and value, or None for the key, in what was projected together."""
    *query, others = projected
    maps = (*query, *others.chunk(parts - len(query), 1))
    return maps if parts == 3 else (maps[0], None, maps[1])


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rel_row, rel_col, parts, keep, options):
        ctx.options = tuple(options[name] for name in _OPTIONS)
        ctx.parts = parts
        if not keep and _is_one_call(x, weight, bias, options['backend']):
            output, logsumexp = torch.ops.sasa_det_native.attend(
                x, weight, bias, rel_row, rel_col, parts == 3, *ctx.options
            )
            ctx.dtypes = x.dtype, output.dtype
        else:
            y = _project(x, weight, bias, parts, options['stride'])
            output, logsumexp = below_autograd(*_split(y, parts), rel_row, rel_col, *ctx.options)
            ctx.dtypes = y[0].dtype, output.dtype  # autocast may have changed either
        kept = y if keep else []
        ctx.save_for_backward(x, weight, bias, rel_row, rel_col, logsumexp, *kept)
        return output

    @staticmethod
    def backward(ctx, grad):
        *inputs, logsumexp = ctx.saved_tensors[:6]
        y = ctx.saved_tensors[6:]
        x_dtype, map_dtype = ctx.dtypes
        # With create_graph, or under torch.func, somebody may differentiate what comes out.
        if torch.is_grad_enabled() or is_transformed(grad):
            return *_differentiable_grads(ctx, grad, inputs), None, None, None
        with torch.autocast(grad.device.type, enabled=False):
            given = (_to(each, x_dtype) for each in inputs[:3])
            projections = _projections(*given, ctx.parts, ctx.options[-1])
            y = [each.to(map_dtype) for each in y or [project(*each) for each in projections]]
            # As the projections' backward takes them: queries, keys and values in one tensor, or two.
            grad_y = [empty_output(each) for each in y]
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
            projected = [
                project_backward(of_y.to(x_dtype), of, weight, wanted)
                for of_y, (of, weight, _) in zip(grad_y, projections)
            ]
            grads = (*_joined(*projected, stride=ctx.options[-1]), *tables)
        return (
            *(g.to(each.dtype) if each is not None and needed else None
              for each, needed, g in zip(inputs, ctx.needs_input_grad, grads)),
            *[None] * 3,
        )  # fmt: skip


def _differentiable_grads(
    ctx, grad: Tensor, inputs: List[Optional[Tensor]]
) -> List[Optional[Tensor]]:
    """Compute the gradients of a projected attention's inputs by operations that autograd sees."""
    x_dtype, map_dtype = ctx.dtypes
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        given = (_to(each, x_dtype) for each in inputs[:3])
        y = [each.to(map_dtype) for each in _project(*given, ctx.parts, ctx.options[-1])]
        tables = (_to(each, map_dtype) for each in inputs[3:])
        output = local_attention(*_split(y, ctx.parts), *tables, **dict(zip(_OPTIONS, ctx.options)))
        wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad) if needed]
        grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(grads) if needed else None for needed in ctx.needs_input_grad[:5]]


def _joined(*grads: tuple, stride: int) -> tuple:
    """Join the gradients of x, weight and bias that the queries' projection has and the others'."""
    if len(grads) == 1:
        return grads[0]
    (of_queries, *first), (of_x, *second) = grads
    if of_x is not None:
        strided(of_x, stride).add_(of_queries)
    return of_x, *(None if a is None else torch.cat((a, b)) for a, b in zip(first, second))


def _to(x: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    return None if x is None else x.to(dtype)
