"""Local attention in Triton, for CUDA; the kernels and how they work are in ``triton_kernels.py``.

Triton is imported when a kernel is first wanted, not with this module.
"""

import os
from functools import cache
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .geometry import Window, compute_dtype, empty_output

# What the kernels are compiled and tested for.
_LARGEST_KERNEL = 31
_LARGEST_DEPTH = 128
_OLDEST_GPU = (8, 0)
# Programs that the queries' backward aims at, each of which sums the relative positions' gradients of some
# tiles: enough to fill any GPU several times over.
_PROGRAMS = 4096


def missing() -> Optional[str]:
    """Say why there are no Triton kernels here; None if there are."""
    if not _interpreted() and not torch.cuda.is_available():
        return 'it computes on NVIDIA GPUs, and torch finds none here'
    return _import_error()


def refuse(query: Tensor, window: Window) -> Optional[str]:
    """Say why these kernels cannot compute an input; None if they can."""
    interpreted = _interpreted()
    if query.device.type != ('cpu' if interpreted else 'cuda'):
        where = 'on the CPU, under TRITON_INTERPRET=1' if interpreted else 'on CUDA devices'
        return f'it computes {where}, but query is on {query.device}'
    if query.dtype == torch.float64 and not interpreted:
        return 'it takes float32, bfloat16 and float16, but query is torch.float64'
    if window.kernel_size > _LARGEST_KERNEL:
        return f'it takes kernel_size up to {_LARGEST_KERNEL}, but it is {window.kernel_size}'
    depth = query.shape[1] // window.num_heads
    if depth > _LARGEST_DEPTH:
        return f'it takes up to {_LARGEST_DEPTH} channels a head, but there are {depth}'
    if not interpreted:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < _OLDEST_GPU:
            return (
                f'it takes GPUs of compute capability {_OLDEST_GPU[0]}.{_OLDEST_GPU[1]} and later, '
                f'but {query.device} has {capability[0]}.{capability[1]}'
            )
    return None


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU; Triton itself reads this when it is imported."""
    return os.environ.get('TRITON_INTERPRET') == '1'


@cache
def _import_error() -> Optional[str]:
    try:
        from . import triton_kernels  # noqa: F401
    except Exception as error:  # a broken installation fails in many ways
        return f'Triton does not import ({type(error).__name__}: {error})'
    return None


class Tile(NamedTuple):
    """How a kernel cuts a map: the edges of a tile, what is padded to powers of two, and its warps."""

    rows: int
    cols: int
    pixels: int
    span: int
    warps: int
    stages: int


def choose_tile(window: int, pixels: int, warps: int, stages: int) -> Tile:
    """Choose the edges of a tile for which the products of the kernels compute the fewest pairs in vain.

    Args:
        window: Edge of the window.
        pixels: Pixels in a tile, a power of two; the tile is the largest that fits.
        warps: Passed on.
        stages: Passed on.

    Example:
        >>> choose_tile(7, 64, 4, 2)[:4]
        (6, 10, 64, 16)
    """
    _, rows, cols, span = max(
        (rows * cols / ((rows + window - 1) * span), rows, cols, span)
        for span in (16, 32, 64)
        for cols in range(1, min(span - window + 1, pixels) + 1)
        for rows in (pixels // cols,)
    )
    return Tile(rows, cols, pixels, span, warps, stages)


def forward(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
) -> Tuple[Tensor, Tensor]:
    """Compute the attention; arguments and results as in :func:`sasa_det.ops.eager.forward`."""
    from .triton_kernels import forward_kernel

    output = empty_output(query)
    logsumexp = query.new_empty(
        (query.shape[0], window.num_heads, *query.shape[2:]), dtype=compute_dtype(query.dtype)
    )
    maps = [query, query if key is None else key, value, output]
    tile = choose_tile(window.kernel_size, 64, 4, 2)
    tiles = _count_tiles(query, window, tile)
    grid = (tiles * window.num_heads * query.shape[0],)
    if query.numel():
        with torch.cuda.device_of(query):
            forward_kernel[grid](
                *maps[:3], *_tables(rel_row, rel_col), output, logsumexp,
                *_strides(maps), *_sizes(query, window), tiles,
                **_options(maps, key, rel_row, window, tile),
            )  # fmt: skip
    return output, logsumexp


def backward(
    grad: Tensor,
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    logsumexp: Tensor,
    window: Window,
) -> Tuple[Optional[Tensor], ...]:
    """Compute the gradients; arguments and results as in :func:`sasa_det.ops.eager.backward`."""
    from .triton_kernels import backward_keys_kernel, backward_queries_kernel

    grad_query, grad_value = empty_output(query), empty_output(value)
    grad_key = None if key is None else empty_output(key)
    delta = torch.empty_like(logsumexp)
    inputs = [grad, query, query if key is None else key, value]
    tables = _tables(rel_row, rel_col)
    tile = choose_tile(window.kernel_size, 64, 4, 2)
    tiles = _count_tiles(query, window, tile)
    planes = query.shape[0] * window.num_heads
    groups = min(tiles, -(-_PROGRAMS // max(planes, 1)))
    partial = None
    if rel_row is not None:
        partial = logsumexp.new_empty(
            (query.shape[0], window.num_heads, groups, 2, *rel_row.shape[1:])
        )
    if query.numel():
        with torch.cuda.device_of(query):
            maps = [*inputs, grad_query]
            backward_queries_kernel[(planes * groups,)](
                *inputs, *tables, logsumexp, grad_query, delta, partial,
                *_strides(maps), *_sizes(query, window), tiles, groups,
                **_options(maps, key, rel_row, window, tile),
            )  # fmt: skip
            maps = [*inputs, grad_value if key is None else grad_key, grad_value]
            backward_keys_kernel[(planes * tiles,)](
                *inputs, *tables, logsumexp, delta, *maps[-2:],
                *_strides(maps), *_sizes(query, window), tiles,
                **_options(maps, key, rel_row, window, tile),
            )  # fmt: skip
    if partial is None:
        return grad_query, grad_key, grad_value, None, None
    partial = partial.sum((0, 2))
    if rel_row.shape[0] == 1:
        partial = partial.sum(0, keepdim=True)
    # Copied, as contiguous() leaves the odd stride of a dimension of size one, which DDP warns of.
    grad_row, grad_col = (
        x.to(rel_row.dtype).clone(memory_format=torch.contiguous_format) for x in partial.unbind(1)
    )
    return grad_query, grad_key, grad_value, grad_row, grad_col


def _dilation(query: Tensor, window: Window) -> int:
    # Where it is as large as the map all neighbours but the centre are outside, and larger is the same.
    return min(window.dilation, max(query.shape[2:]))


def _count_tiles(query: Tensor, window: Window, tile: Tile) -> int:
    height, width = query.shape[2:]
    dilation = _dilation(query, window)
    phases = min(dilation, height) * min(dilation, width)
    down, across = -(-height // dilation), -(-width // dilation)
    return phases * -(-down // tile.rows) * -(-across // tile.cols)


def _tables(rel_row: Optional[Tensor], rel_col: Optional[Tensor]) -> tuple:
    return tuple(None if x is None else x.contiguous() for x in (rel_row, rel_col))


def _unit(maps: list) -> int:
    """Find what all strides but the channels' are multiples of: 8 in most channels_last maps, else 1."""
    strides = [x.stride() for x in maps]
    return 8 if all(c == 1 and not (b % 8 or h % 8 or w % 8) for b, c, h, w in strides) else 1


def _strides(maps: list) -> list:
    unit = _unit(maps)
    strides = (x.stride() for x in maps)
    return [s for b, c, h, w in strides for s in (b // unit, c, h // unit, w // unit)]


def _sizes(query: Tensor, window: Window) -> tuple:
    return (*query.shape[2:], window.num_heads, _dilation(query, window))


def _options(
    maps: list, key: Optional[Tensor], rel_row: Optional[Tensor], window: Window, tile: Tile
) -> dict:
    """Collect the kernels' constants, which decide what is compiled, and how."""
    import triton.language as tl

    query = maps[0]
    depth = query.shape[1] // window.num_heads
    span = max(
        sum((size - 1) * stride for size, stride in zip((depth, *x.shape[2:]), x.stride()[1:]))
        for x in maps
    )
    return dict(
        SCALE=window.scale,
        WINDOW=window.kernel_size,
        DEPTH=depth,
        MASK=window.border == 'mask',
        HAS_KEY=key is not None,
        HAS_POSITIONS=rel_row is not None,
        PER_HEAD=rel_row is not None and rel_row.shape[0] > 1,
        ROWS=tile.rows,
        COLS=tile.cols,
        TILE=tile.pixels,
        SPAN=tile.span,
        # Matrix units take products of 16 and more.
        OFFSETS=max(_power_of_two(window.kernel_size), 16),
        PADDED=max(_power_of_two(depth), 16),
        UNIT=_unit(maps),
        # Offsets within a plane; where a plane begins is always in 64 bits.
        INDEX=tl.int32 if span < 2**31 else tl.int64,
        SUM=tl.float64 if query.dtype == torch.float64 else tl.float32,
        PRECISION=_precision(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _precision() -> str:
    """Multiply float32 as torch's matrix products are told to."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):
        return 'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if matmul.allow_tf32 else 'ieee'
