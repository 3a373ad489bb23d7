"""How the Triton backend cuts a map into tiles, and what it launches each kernel with."""

import math
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..window import Window


def load_kernels() -> ModuleType:
    """Import the kernels, and Triton with them, which takes seconds: so not before they are wanted."""
    from . import triton_kernels

    return triton_kernels


class Tile(NamedTuple):
    """How a map is cut: a tile's edges, what pads it to powers of two, its warps, its loads in flight."""

    rows: int
    cols: int
    pixels: int
    span: int
    warps: int
    stages: int


@cache
def choose_tile(kernel: str, window: int, depth: int, itemsize: int) -> Tile:
    """Choose how a kernel cuts a map.

    One choice for each window, depth and type rather than a search at the first call: results then have
    the same bits every time. Tiles of one warp were the fastest of all tried on an H200, though they
    compute more pairs of pixels in vain than larger ones: warps that share a tile wait for each other.
    More warps where one has too few registers, by ``tools/checks/triton_builds.py``. The edges are those
    for which the products compute the fewest pairs in vain.

    Args:
        kernel: Its name in ``triton_kernels.py``.
        window: Edge of the window.
        depth: Channels of a head.
        itemsize: Bytes of a number.

    Examples:
        >>> choose_tile('forward_kernel', 7, 32, 2)
        Tile(rows=2, cols=8, pixels=16, span=16, warps=1, stages=2)
    """
    row = pad(depth) * itemsize
    # Twice as many keys were faster yet, where there are registers for the gradients of both maps.
    roomy = kernel == 'backward_keys_kernel' and itemsize == 2 and row <= 64 and window < 16
    pixels = 32 if roomy else 16
    warps = 1 if row <= 128 else row // 64
    _, rows, cols, span = max(
        (rows * cols / ((rows + window - 1) * span), rows, cols, span)
        for span in (16, 32, 64)
        for cols in range(1, min(span - window + 1, pixels) + 1)
        for rows in (pixels // cols,)
    )
    return Tile(rows, cols, pixels, span, warps, stages=2)


def pad(size: int) -> int:
    """Return the power of two that holds a size, at least 16, as matrix units want it."""
    return max(1 << (size - 1).bit_length(), 16)


class Launch(NamedTuple):
    """A kernel's name, how many programs it takes, and its arguments."""

    kernel: str
    programs: int
    arguments: Dict[str, Any]

    def run(self) -> None:
        """Queue the kernel on the device of its arguments."""
        with torch.cuda.device_of(self.arguments['q']):
            getattr(load_kernels(), self.kernel)[(self.programs,)](**self.arguments)


def forward_launch(
    query, key, value, rel_row, rel_col, output, logsumexp, window: Window
) -> Launch:
    """Lay out the launch that computes ``output`` and ``logsumexp``."""
    maps = dict(q=query, k=key, v=value, o=output)
    return _launch('forward_kernel', maps, rel_row, rel_col, dict(logsumexp=logsumexp), window)


def backward_launches(
    grad, query, key, value, rel_row, rel_col, logsumexp, grad_query, grad_key, grad_value, partial,
    window: Window,
) -> List[Launch]:  # fmt: skip
    """Lay out the launches that compute the gradients, in their order."""
    inputs = dict(g=grad, q=query, k=key, v=value)
    sums = dict(logsumexp=logsumexp, delta=torch.empty_like(logsumexp))
    by_queries = inputs | dict(gq=grad_query)
    by_keys = inputs | dict(gk=grad_key, gv=grad_value)
    tables = (rel_row, rel_col)
    return [
        _launch(
            'backward_queries_kernel', by_queries, *tables, sums | dict(partial=partial), window
        ),
        _launch('backward_keys_kernel', by_keys, *tables, sums, window),
    ]


def empty_partial(query: Tensor, rel_row: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """Allocate a sum for each tile, so that programs share none and the order is fixed.

    Zeros fill the last chunk up.
    """
    chunk = load_kernels().CHUNK.value
    batch, channels, height, width = query.shape
    depth = channels // window.num_heads
    tile = choose_tile('backward_queries_kernel', window.kernel_size, depth, query.element_size())
    tiles = _count_tiles(tile, height, width, window)
    chunks = -(-tiles // chunk)
    shape = (batch, window.num_heads, chunks, chunk, 2, *rel_row.shape[1:])
    partial = query.new_empty(shape, dtype=dtype)
    partial[:, :, -1, tiles - (chunks - 1) * chunk :].zero_()
    return partial


def sum_partial(partial: Tensor, table: Tensor) -> Tuple[Tensor, Tensor]:
    """Sum what `empty_partial` allocated, as the positions are shared by the heads."""
    # By chunks first: torch's sum takes as much memory again where a few sums are of many terms.
    partial = partial.sum(3)
    over = (0, 1, 2) if table.shape[0] == 1 else (0, 2)
    total = partial.sum(over, keepdim=True)[0, :, 0]
    # Copied, as contiguous() leaves the odd stride of a dimension of size one, which DDP warns of.
    return tuple(
        x.to(table.dtype).clone(memory_format=torch.contiguous_format) for x in total.unbind(1)
    )


def _launch(
    kernel: str,
    maps: Dict[str, Optional[Tensor]],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    sums: Dict[str, Optional[Tensor]],
    window: Window,
) -> Launch:
    query = maps['q']
    tensors = dict(
        **maps,
        **sums,
        rel_row=None if rel_row is None else rel_row.contiguous(),
        rel_col=None if rel_col is None else rel_col.contiguous(),
    )
    strides = tuple((name, None if x is None else x.stride()) for name, x in maps.items())
    heads = 0 if rel_row is None else rel_row.shape[0]
    programs, others = _lay_out(
        kernel, tuple(query.shape), query.dtype, strides, heads, window, _precision()
    )
    return Launch(kernel, programs, {**tensors, **others})


# Laid out anew at each launch, these would keep small maps' kernels waiting for Python.
@lru_cache(maxsize=4096)
def _lay_out(
    kernel: str,
    shape: Tuple[int, ...],
    dtype: torch.dtype,
    strides: Tuple[Tuple[str, Optional[Tuple[int, ...]]], ...],
    table_heads: int,
    window: Window,
    precision: str,
) -> Tuple[int, Dict[str, Any]]:
    """Choose how many programs a launch takes, and all of its arguments that are not tensors."""
    import triton.language as tl

    batch, channels, height, width = shape
    depth = channels // window.num_heads
    tile = choose_tile(kernel, window.kernel_size, depth, dtype.itemsize)
    tiles = _count_tiles(tile, height, width, window)
    there = [stride for _, stride in strides if stride is not None]
    # What all strides but the channels' are multiples of, in most channels_last maps.
    unit = 8 if all(c == 1 and not math.gcd(b, h, w) % 8 for b, c, h, w in there) else 1
    arguments = {}
    for name, stride in strides:
        b, c, h, w = stride or (0, 0, 0, 0)
        arguments |= {
            f'{name}_b': b // unit, f'{name}_c': c, f'{name}_h': h // unit, f'{name}_w': w // unit,
        }  # fmt: skip
    extent = max((depth - 1) * c + (height - 1) * h + (width - 1) * w for _, c, h, w in there)
    wide = extent >= 2**31
    # Addresses of 64 bits take twice the registers; of 64 channels that lie apart, each has its own.
    crowded = wide or (unit == 1 and depth > 32 and tile.warps == 1)
    arguments |= dict(
        height=height,
        width=width,
        num_heads=window.num_heads,
        dilation=window.dilation_in(height, width),
        tiles=tiles,
        SCALE=window.scale,
        WINDOW=window.kernel_size,
        DEPTH=depth,
        MASK=window.border == 'mask',
        HAS_KEY=dict(strides)['k'] is not None,
        HAS_POSITIONS=table_heads > 0,
        PER_HEAD=table_heads > 1,
        ROWS=tile.rows,
        COLS=tile.cols,
        TILE=tile.pixels,
        SPAN=tile.span,
        OFFSETS=pad(window.kernel_size),
        PADDED=pad(depth),
        UNIT=unit,
        # Offsets within a plane; where a plane begins is always in 64 bits.
        INDEX=tl.int64 if wide else tl.int32,
        SUM=tl.float64 if dtype == torch.float64 else tl.float32,
        PRECISION=precision,
        num_warps=tile.warps * 2 if crowded else tile.warps,
        num_stages=tile.stages,
    )
    return batch * window.num_heads * tiles, arguments


def _count_tiles(tile: Tile, height: int, width: int, window: Window) -> int:
    dilation = window.dilation_in(height, width)
    phases = min(dilation, height) * min(dilation, width)
    down, across = -(-height // dilation), -(-width // dilation)
    return phases * -(-down // tile.rows) * -(-across // tile.cols)


def _precision() -> str:
    """Multiply float32 as torch's matrix products are told to."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):
        return 'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if matmul.allow_tf32 else 'ieee'  # torch < 2.9
