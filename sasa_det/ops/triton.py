"""Local attention in Triton, for CUDA; the kernels and how they work are in ``triton_kernels.py``.

Triton is imported when a kernel is first wanted, not with this module.
"""

import math
import os
from functools import cache
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .geometry import Window, compute_dtype, empty_output, sum_table_grads

# What the kernels are compiled and tested for.
_LARGEST_KERNEL = 31
_LARGEST_DEPTH = 128
_OLDEST_GPU = (8, 0)


def missing() -> Optional[str]:
    """Say why there are no Triton kernels here; None if there are."""
    if _interpreted():
        return _import_error()
    if torch.version.hip is not None or not torch.cuda.is_available():
        return 'it computes on NVIDIA GPUs, and torch finds none here'
    newest = _newest_gpu()
    if newest < _OLDEST_GPU:
        return _too_old('the newest here', newest)
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
            return _too_old(str(query.device), capability)
    return None


def _too_old(gpu: str, capability: Tuple[int, int]) -> str:
    least, has = ('.'.join(map(str, x)) for x in (_OLDEST_GPU, capability))
    return f'it takes GPUs of compute capability {least} and later, but {gpu} has {has}'


@cache
def _newest_gpu() -> Tuple[int, int]:
    return max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))


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
    """How a map is cut: a tile's edges, what pads it to powers of two, its warps, its loads in flight."""

    rows: int
    cols: int
    pixels: int
    span: int
    warps: int
    stages: int


@cache
def choose_tile(window: int, depth: int, itemsize: int) -> Tile:
    """Choose how the kernels cut a map.

    One choice for each window, depth and type rather than a search at the first call: results then have
    the same bits every time. Pixels, warps and stages are ones that stay within the registers, by
    ``tools/check_triton_builds.py``; nothing has been timed. The edges are those for
    which the products compute the fewest pairs of pixels in vain.

    Args:
        window: Edge of the window.
        depth: Channels of a head.
        itemsize: Bytes of a number.

    Examples:
        >>> choose_tile(7, 32, 2)
        Tile(rows=6, cols=10, pixels=64, span=16, warps=4, stages=2)
    """
    row = pad(depth) * itemsize
    if itemsize == 2:
        pixels, warps, stages = 64, 4 if row <= 128 else 8, 2
    elif row <= 64:
        pixels, warps, stages = 64, 4, 2
    else:
        pixels, warps, stages = 64 if row <= 128 else 32, 8, 3
    _, rows, cols, span = max(
        (rows * cols / ((rows + window - 1) * span), rows, cols, span)
        for span in (16, 32, 64)
        for cols in range(1, min(span - window + 1, pixels) + 1)
        for rows in (pixels // cols,)
    )
    return Tile(rows, cols, pixels, span, warps, stages)


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
        from . import triton_kernels

        with torch.cuda.device_of(self.arguments['q']):
            getattr(triton_kernels, self.kernel)[(self.programs,)](**self.arguments)


def forward(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
) -> Tuple[Tensor, Tensor]:
    """Compute the attention; arguments and results as in :func:`sasa_det.ops.eager.forward`."""
    output = empty_output(query)
    shape = (query.shape[0], window.num_heads, *query.shape[2:])
    logsumexp = query.new_empty(shape, dtype=compute_dtype(query.dtype))
    if query.numel():
        forward_launch(query, key, value, rel_row, rel_col, output, logsumexp, window).run()
    return output, logsumexp


def forward_launch(
    query, key, value, rel_row, rel_col, output, logsumexp, window: Window
) -> Launch:
    """Lay out the launch that computes ``output`` and ``logsumexp``."""
    maps = dict(q=query, k=key, v=value, o=output)
    return _launch('forward_kernel', maps, rel_row, rel_col, dict(logsumexp=logsumexp), window)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    logsumexp: Tensor,
    grad_maps: Tuple[Tensor, Optional[Tensor], Tensor],
    window: Window,
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Compute the gradients; arguments and results as in :func:`sasa_det.ops.eager.backward`."""
    partial = None
    if rel_row is not None:
        # One sum for each tile, so that programs share none and the order is fixed.
        tiles = _count_tiles(query, window)
        shape = (query.shape[0], window.num_heads, tiles, 2, *rel_row.shape[1:])
        partial = logsumexp.new_empty(shape)
    if query.numel():
        inputs = (grad, query, key, value, rel_row, rel_col, logsumexp)
        for launch in backward_launches(*inputs, *grad_maps, partial, window):
            launch.run()
    return (None, None) if partial is None else sum_table_grads(partial, rel_row)


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


def _launch(
    kernel: str,
    maps: Dict[str, Optional[Tensor]],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    sums: Dict[str, Optional[Tensor]],
    window: Window,
) -> Launch:
    import triton.language as tl

    query = maps['q']
    batch, channels, height, width = query.shape
    depth = channels // window.num_heads
    tile = choose_tile(window.kernel_size, depth, query.element_size())
    tiles = _count_tiles(query, window)
    there = [x for x in maps.values() if x is not None]
    # What all strides but the channels' are multiples of, in most channels_last maps.
    unit = 8 if all(x.stride(1) == 1 and not _others(x) % 8 for x in there) else 1
    strides = {}
    for name, x in maps.items():
        b, c, h, w = (0, 0, 0, 0) if x is None else x.stride()
        strides |= {
            f'{name}_b': b // unit, f'{name}_c': c, f'{name}_h': h // unit, f'{name}_w': w // unit,
        }  # fmt: skip
    extent = max(
        sum((size - 1) * stride for size, stride in zip((depth, height, width), x.stride()[1:]))
        for x in there
    )
    # Addresses of 64 bits take twice the registers: more warps share them.
    wide = extent >= 2**31
    arguments = dict(
        **maps,
        **sums,
        rel_row=None if rel_row is None else rel_row.contiguous(),
        rel_col=None if rel_col is None else rel_col.contiguous(),
        **strides,
        height=height,
        width=width,
        num_heads=window.num_heads,
        dilation=_dilation(query, window),
        tiles=tiles,
        SCALE=window.scale,
        WINDOW=window.kernel_size,
        DEPTH=depth,
        MASK=window.border == 'mask',
        HAS_KEY=maps['k'] is not None,
        HAS_POSITIONS=rel_row is not None,
        PER_HEAD=rel_row is not None and rel_row.shape[0] > 1,
        ROWS=tile.rows,
        COLS=tile.cols,
        TILE=tile.pixels,
        SPAN=tile.span,
        OFFSETS=pad(window.kernel_size),
        PADDED=pad(depth),
        UNIT=unit,
        # Offsets within a plane; where a plane begins is always in 64 bits.
        INDEX=tl.int64 if wide else tl.int32,
        SUM=tl.float64 if query.dtype == torch.float64 else tl.float32,
        PRECISION=_precision(),
        num_warps=8 if wide else tile.warps,
        num_stages=tile.stages,
    )
    return Launch(kernel, batch * window.num_heads * tiles, arguments)


def _others(x: Tensor) -> int:
    """Return a number that has the common divisors of all strides but the channels'."""
    b, _, h, w = x.stride()
    return math.gcd(b, h, w)


def _count_tiles(query: Tensor, window: Window) -> int:
    height, width = query.shape[2:]
    depth = query.shape[1] // window.num_heads
    tile = choose_tile(window.kernel_size, depth, query.element_size())
    dilation = _dilation(query, window)
    phases = min(dilation, height) * min(dilation, width)
    down, across = -(-height // dilation), -(-width // dilation)
    return phases * -(-down // tile.rows) * -(-across // tile.cols)


def _dilation(query: Tensor, window: Window) -> int:
    # Where it is as large as the map all neighbours but the centre are outside, and larger is the same.
    return min(window.dilation, max(query.shape[2:]))


def _precision() -> str:
    """Multiply float32 as torch's matrix products are told to."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):
        return 'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if matmul.allow_tf32 else 'ieee'  # torch < 2.9
