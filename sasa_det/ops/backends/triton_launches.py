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
    """How a map is cut into tiles, and what computes one.

    Attributes:
        height, width: Edges of a tile, in pixels.
        block: The power of two that holds a tile's pixels.
        halo_block: The power of two that holds a row of its halo, every pixel that its windows reach.
        warps: That share a tile.
        stages: Loads in flight.
    """

    height: int
    width: int
    block: int
    halo_block: int
    warps: int
    stages: int


@cache
def choose_tile(kernel: str, window: int, depth: int, itemsize: int) -> Tile:
    """Choose how a kernel cuts a map.

    One choice for each window, depth and type, rather than a search at the first call: so results have
    the same bits every time.

    Tiles of one warp were the fastest of all tried on an H200. They compute more pairs of pixels in vain
    than larger tiles, but warps that share a tile wait for each other. There are more warps where one has
    too few registers, by ``tools/checks/triton_builds.py``.

    The edges are those for which the products compute the fewest pairs in vain.

    Args:
        kernel: Its name in ``triton_kernels.py``.
        window: Edge of the window.
        depth: Channels of a head.
        itemsize: Bytes of a number.

    Examples:
        >>> choose_tile('forward_kernel', 7, 32, 2)
        Tile(height=2, width=8, block=16, halo_block=16, warps=1, stages=2)
    """
    pixel_bytes = block_size(depth) * itemsize
    # Tiles of twice as many keys were faster yet, where registers hold the gradients of both K and V.
    large = kernel == 'backward_dkdv_kernel' and itemsize == 2 and pixel_bytes <= 64 and window < 16
    block = 32 if large else 16
    warps = 1 if pixel_bytes <= 128 else pixel_bytes // 64
    _, height, width, halo_block = max(
        (height * width / ((height + window - 1) * halo_block), height, width, halo_block)
        for halo_block in (16, 32, 64)
        for width in range(1, min(halo_block - window + 1, block) + 1)
        for height in (block // width,)
    )
    return Tile(height, width, block, halo_block, warps, stages=2)


def block_size(size: int) -> int:
    """Return the power of two that holds a size, at least 16, as matrix units want it."""
    return max(1 << (size - 1).bit_length(), 16)


class Launch(NamedTuple):
    """A kernel's name, how many programs it takes, and its arguments."""

    kernel: str
    programs: int
    arguments: Dict[str, Any]

    def run(self) -> None:
        """Queue the kernel on the device of its arguments."""
        with torch.cuda.device_of(self.arguments['q_ptr']):
            getattr(load_kernels(), self.kernel)[(self.programs,)](**self.arguments)


def forward_launch(
    query, key, value, rel_row, rel_col, output, logsumexp, window: Window
) -> Launch:
    """Lay out the launch that computes ``output`` and ``logsumexp``."""
    maps = dict(q=query, k=key, v=value, o=output)
    return _launch('forward_kernel', maps, rel_row, rel_col, dict(lse_ptr=logsumexp), window)


def backward_launches(
    grad, query, key, value, rel_row, rel_col, logsumexp, grad_query, grad_key, grad_value,
    rel_partials, window: Window,
) -> List[Launch]:  # fmt: skip
    """Lay out the launches that compute the gradients, in their order.

    ``rel_partials`` is what `empty_rel_partials` allocates; None without relative positions.
    """
    maps = dict(do=grad, q=query, k=key, v=value)
    sums = dict(lse_ptr=logsumexp, delta_ptr=torch.empty_like(logsumexp))
    dq_maps, dq_sums = dict(**maps, dq=grad_query), dict(**sums, drel_partial_ptr=rel_partials)
    dkdv_maps = dict(**maps, dk=grad_key, dv=grad_value)
    return [
        _launch('backward_dq_kernel', dq_maps, rel_row, rel_col, dq_sums, window),
        _launch('backward_dkdv_kernel', dkdv_maps, rel_row, rel_col, sums, window),
    ]


def empty_rel_partials(
    query: Tensor, rel_row: Tensor, window: Window, dtype: torch.dtype
) -> Tensor:
    """Allocate each tile's partial sum of the gradients of relative positions.

    Programs share no sum, so the order of summation is fixed.

    Returns:
        (B, num_heads, chunks, CHUNK, 2, depth / 2, k): by tiles in chunks, for rel_row and rel_col. Zeros
        fill the last chunk up.
    """
    chunk = load_kernels().CHUNK.value
    batch, channels, height, width = query.shape
    depth = channels // window.num_heads
    tile = choose_tile('backward_dq_kernel', window.kernel_size, depth, query.element_size())
    tiles = _count_tiles(tile, height, width, window)
    chunks = -(-tiles // chunk)
    shape = (batch, window.num_heads, chunks, chunk, 2, *rel_row.shape[1:])
    partials = query.new_empty(shape, dtype=dtype)
    partials[:, :, -1, tiles - (chunks - 1) * chunk :].zero_()
    return partials


def sum_rel_partials(partials: Tensor, table: Tensor) -> Tuple[Tensor, Tensor]:
    """Sum the tiles' partial sums: the gradients of rel_row and rel_col, of a table's shape and type."""
    # By chunks first: torch's sum takes as much memory again where a few sums are of many terms.
    partials = partials.sum(3)
    over = (0, 1, 2) if table.shape[0] == 1 else (0, 2)
    total = partials.sum(over, keepdim=True)[0, :, 0]
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
    """Lay out a launch, of maps that are passed with their strides and of sums that are contiguous."""
    query = maps['q']
    tensors = dict(
        **{f'{name}_ptr': x for name, x in maps.items()},
        **sums,
        rel_row_ptr=None if rel_row is None else rel_row.contiguous(),
        rel_col_ptr=None if rel_col is None else rel_col.contiguous(),
    )
    strides = tuple((name, None if x is None else x.stride()) for name, x in maps.items())
    table_heads = 0 if rel_row is None else rel_row.shape[0]
    programs, others = _lay_out(
        kernel, tuple(query.shape), query.dtype, strides, table_heads, window, _input_precision()
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
    # M is queries and N is keys. The tile is of keys in one kernel, and of queries in the others.
    block_m, block_n = tile.block, tile.halo_block
    if kernel == 'backward_dkdv_kernel':
        block_m, block_n = block_n, block_m
    present = [stride for _, stride in strides if stride is not None]
    # What all strides but the channels' are multiples of, in most channels_last maps.
    unit = 8 if all(c == 1 and not math.gcd(b, h, w) % 8 for b, c, h, w in present) else 1
    arguments = {}
    for name, stride in strides:
        b, c, h, w = stride or (0, 0, 0, 0)
        arguments |= {
            f'stride_{name}b': b // unit,
            f'stride_{name}c': c,
            f'stride_{name}h': h // unit,
            f'stride_{name}w': w // unit,
        }
    extent = max((depth - 1) * c + (height - 1) * h + (width - 1) * w for _, c, h, w in present)
    wide = extent >= 2**31
    # Addresses of 64 bits take twice the registers. Of 64 channels that lie apart, each has its own address.
    crowded = wide or (unit == 1 and depth > 32 and tile.warps == 1)
    arguments |= dict(
        height=height,
        width=width,
        num_heads=window.num_heads,
        dilation=window.dilation_in(height, width),
        num_tiles=tiles,
        SCALE=window.scale,
        WINDOW=window.kernel_size,
        HEAD_DIM=depth,
        MASK_BORDER=window.border == 'mask',
        HAS_K=dict(strides)['k'] is not None,
        HAS_REL=table_heads > 0,
        REL_PER_HEAD=table_heads > 1,
        TILE_H=tile.height,
        TILE_W=tile.width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_size(window.kernel_size),
        BLOCK_D=block_size(depth),
        UNIT=unit,
        # Offsets within a head of an image; where that begins is always in 64 bits.
        OFFSET_DTYPE=tl.int64 if wide else tl.int32,
        ACC_DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        INPUT_PRECISION=precision,
        num_warps=tile.warps * 2 if crowded else tile.warps,
        num_stages=tile.stages,
    )
    return batch * window.num_heads * tiles, arguments


def _count_tiles(tile: Tile, height: int, width: int, window: Window) -> int:
    """Count the tiles of a map, those of every phase of the dilation."""
    dilation = window.dilation_in(height, width)
    phases = min(dilation, height) * min(dilation, width)
    down, across = -(-height // dilation), -(-width // dilation)
    return phases * -(-down // tile.height) * -(-across // tile.width)


def _input_precision() -> str:
    """Multiply float32 as torch's matrix products are told to."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):
        return 'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if matmul.allow_tf32 else 'ieee'  # torch < 2.9
