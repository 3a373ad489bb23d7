"""How the CUDA backend lays out a launch: which variant of a kernel, how many blocks, which arguments.

``csrc/cuda/tile.cuh`` has the same tiles, and fails to compile where its shared memory or its structure of
arguments differs from what is reckoned here.
"""

import ctypes
import math
from functools import cache
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..window import Window

DTYPES = (torch.bfloat16, torch.float16)
DEPTHS = (8, 16, 32, 64)
WINDOWS = (3, 5, 7, 9, 11)
KERNELS = ('forward', 'backward_queries', 'backward_keys')

# A block's warps, and its pixels: rows of a chunk, columns of a strip.
_WARPS, _ROWS, _COLS = 8, 8, 16
# Columns of a warp's tile of 16 pixels: those with which the products compute the fewest pairs in vain.
_TILE_COLS = {3: 4, 5: 4, 7: 2, 9: 8, 11: 4}
# Strips are cut until there are so many blocks, if they are long enough. So the cut, and with it the order in
# which the gradients of the tables are summed, is the same on each GPU.
_WANTED_BLOCKS, _LEAST_LENGTH = 2048, 2
_LOG2_E = 1.4426950408889634
_ADDRESSABLE = 2**30


class Variant(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        dtype: bfloat16 or float16.
        depth: Channels of a head.
        window: Edge of the window.
        masked: Whether keys out of the map take no part.
        dilated: Whether the dilation is more than one.
        has_key: Whether there are keys.
        has_rel: Whether there are relative tables.
    """

    dtype: torch.dtype
    depth: int
    window: int
    masked: bool = False
    dilated: bool = False
    has_key: bool = True
    has_rel: bool = True


def variant_of(
    query: Tensor, key: Optional[Tensor], rel_row: Optional[Tensor], window: Window
) -> Variant:
    """Find the variant that computes an input.

    Args:
        query: (B, C, H, W).
        key: As query, or None.
        rel_row: A table, or None.
        window: The attention's options.
    """
    dilated = window.dilation_in(*query.shape[2:]) > 1
    return Variant(
        query.dtype,
        query.shape[1] // window.num_heads,
        window.kernel_size,
        window.border == 'mask',
        dilated,
        key is not None,
        rel_row is not None,
    )


def _divide_up(number: int, by: int) -> int:
    return -(-number // by)


def _round_up(number: int, to: int) -> int:
    return _divide_up(number, to) * to


class Tile(NamedTuple):
    """How a warp's tile of 16 pixels lies in a block, and what is loaded for it.

    Attributes:
        rows, cols: Edges of the tile.
        halo_rows, halo_cols: What its windows reach; columns that are computed, in eights.
        offsets: Of rows or of columns in the window, in eights.
        pitch: Pixels of a row of the block's halo.
        chunks: That a block computes with at a time.
    """

    rows: int
    cols: int
    halo_rows: int
    halo_cols: int
    offsets: int
    pitch: int
    chunks: int


@cache
def tile_of(window: int) -> Tile:
    """Return the tile for a window.

    Args:
        window: Edge of the window.

    Examples:
        >>> tile_of(7)
        Tile(rows=8, cols=2, halo_rows=14, halo_cols=8, offsets=8, pitch=24, chunks=2)
    """
    cols = _TILE_COLS[window]
    rows = 16 // cols
    halo_cols = _round_up(cols + window - 1, 8)
    pitch = _round_up(_COLS - cols + halo_cols, 4)
    chunks = _divide_up(_ROWS + window - 1, _ROWS)
    return Tile(rows, cols, rows + window - 1, halo_cols, _round_up(window, 8), pitch, chunks)


@cache
def shared_bytes(kernel: str, variant: Variant) -> int:
    """Reckon the shared memory that a block of a kernel takes.

    Args:
        kernel: One of KERNELS.
        variant: What it is compiled for.

    Examples:
        >>> shared_bytes('forward', Variant(torch.bfloat16, depth=32, window=7))
        95232
    """
    depth, window, has_rel = variant.depth, variant.window, variant.has_rel
    tile = tile_of(window)
    half_rows = tile.rows // 2
    ring_rows = (tile.chunks + 1) * _ROWS
    map_row = tile.pitch * 2 * depth
    buffers = _WARPS * 16 * 2 * depth
    tables = has_rel * 2 * tile.offsets // 8 * 32 * max(2, depth // 8) * 4
    if kernel == 'backward_keys':
        terms = window + 2 * (half_rows - 1) + tile.halo_cols + tile.cols - 1
        row = _round_up(2 * map_row + tile.pitch * 4 * (2 + terms), 128)
        return ring_rows * row + tables + buffers
    row_strip = _round_up(max(half_rows + window - 1, tile.offsets + half_rows - 1), 4)
    col_strip = _round_up(max(tile.halo_cols, tile.offsets + tile.cols - 1), 4)
    total = ring_rows * _round_up(map_row * (1 + variant.has_key), 128)
    total += _WARPS * 16 * (row_strip + col_strip) * 4 + tables + buffers
    if kernel == 'backward_queries' and has_rel:
        row_sums = _round_up(max(_round_up(tile.halo_rows, 8), tile.offsets + tile.rows - 1), 4)
        total += _WARPS * 16 * (row_sums + col_strip) * 4
        total += 32 * max(depth // 8, 2) * tile.offsets // 8 * 4
    return total


@cache
def macros(kernel: str, variant: Variant) -> Dict[str, int]:
    """Name what a kernel's source is compiled with.

    Args:
        kernel: One of KERNELS.
        variant: What it is compiled for.
    """
    return dict(
        BF16=int(variant.dtype == torch.bfloat16),
        DEPTH=variant.depth,
        WINDOW=variant.window,
        MASK_BORDER=int(variant.masked),
        DILATED=int(variant.dilated),
        HAS_KEY=int(variant.has_key),
        HAS_REL=int(variant.has_rel),
        REGISTERS=_registers(kernel, variant),
        SHARED_BYTES=shared_bytes(kernel, variant),
        ARGUMENT_BYTES=ctypes.sizeof(Arguments),
    )


def _registers(kernel: str, variant: Variant) -> int:
    """Bound the registers of a thread where that costs nothing; at 128, two blocks share a multiprocessor."""
    if variant.depth <= 32 and kernel == 'backward_keys':
        return 168
    if variant.depth <= 32 and variant.window <= 7 and kernel == 'forward':
        return 128
    return 255


class Map(ctypes.Structure):
    """``Map`` of tile.cuh: the address of a map, and its strides in elements."""

    _fields_ = [
        ('data', ctypes.c_void_p),
        ('image', ctypes.c_int64),
        ('row', ctypes.c_int),
        ('col', ctypes.c_int),
    ]


_MAPS = ('query', 'key', 'value', 'output', 'grad', 'grad_query', 'grad_key', 'grad_value')
_SUMS = ('rel_row', 'rel_col', 'lse', 'delta', 'partials')
_NUMBERS = ('height', 'width', 'heads', 'dilation', 'across', 'pieces', 'length', 'table_stride')


class Arguments(ctypes.Structure):
    """``Arguments`` of tile.cuh, the same for each kernel."""

    _fields_ = [
        *((name, Map) for name in _MAPS),
        *((name, ctypes.c_void_p) for name in _SUMS),
        *((name, ctypes.c_int) for name in _NUMBERS),
        *((name, ctypes.c_float) for name in ('scale', 'factor', 'inverse')),
        ('zero', ctypes.c_uint32),
    ]


class Launch(NamedTuple):
    """A kernel, what it is compiled for, its blocks and its arguments.

    Attributes:
        kernel: One of KERNELS.
        variant: What it is compiled for.
        blocks: How many.
        arguments: Addresses of the tensors below, and numbers.
        reads: Tensors, which must live until the kernel is queued.
        writes: The same.
    """

    kernel: str
    variant: Variant
    blocks: int
    arguments: Arguments
    reads: Tuple[Tensor, ...]
    writes: Tuple[Tensor, ...]


class Cut(NamedTuple):
    """How a map is cut into blocks.

    Attributes:
        across: Strips of a phase of the dilation, next to each other.
        pieces: Of a strip, one for each block.
        length: Chunks of a piece, one under the other.
        blocks: Of one head of one image.
    """

    across: int
    pieces: int
    length: int
    blocks: int


def cut(query: Tensor, window: Window) -> Cut:
    """Cut a map into the pieces that a block computes.

    Args:
        query: (B, C, H, W).
        window: The attention's options.

    Examples:
        >>> cut(torch.empty(16, 256, 100, 168, device='meta'), Window(7, 8))
        Cut(across=11, pieces=2, length=7, blocks=22)
    """
    batch, _, height, width = query.shape
    dilation = window.dilation_in(height, width)
    phases = min(dilation, height) * min(dilation, width)
    chunks = _divide_up(_divide_up(height, dilation), _ROWS)
    across = _divide_up(_divide_up(width, dilation), _COLS)
    strips = batch * window.num_heads * phases * across
    wanted_pieces = _divide_up(_WANTED_BLOCKS, max(strips, 1))
    length = max(_divide_up(chunks, wanted_pieces), min(_LEAST_LENGTH, chunks))
    pieces = _divide_up(chunks, length)
    return Cut(across, pieces, length, phases * across * pieces)


def fits(x: Tensor) -> bool:
    """Say whether the kernels can read and write a map as it lies in memory.

    A pixel's channels must be adjacent, and begin at multiples of 16 bytes. An image's pixels must be within
    2^30 elements.

    Args:
        x: (B, C, H, W) in a type of two bytes.

    Examples:
        >>> x = torch.empty(1, 8, 4, 4, dtype=torch.float16)
        >>> fits(x), fits(x.contiguous(memory_format=torch.channels_last))
        (False, True)
    """
    image, channel, row, col = _strides(x)
    if channel != 1 or x.data_ptr() % 16 or math.gcd(image, row, col) % 8:
        return False
    _, channels, height, width = x.shape
    return (height - 1) * row + (width - 1) * col + channels < _ADDRESSABLE


def _strides(x: Tensor) -> List[int]:
    """Return strides, zero for dimensions of one element: theirs may be anything."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape)]


def laid_out(*maps: Tensor) -> List[Tensor]:
    """Return maps that the kernels can read, all of the same strides: copies where the given ones do not fit.

    Args:
        maps: (B, C, H, W) each.
    """
    return [x if y is x else y.copy_(x) for x, y in zip(maps, room_for(*maps))]


def room_for(*maps: Tensor) -> List[Tensor]:
    """Return maps that the kernels can write, all of the same strides: new ones where those given do not fit.

    Args:
        maps: (B, C, H, W) each.
    """
    if all(map(fits, maps)) and all(_strides(x) == _strides(maps[0]) for x in maps[1:]):
        return list(maps)
    like = dict(dtype=maps[0].dtype, device=maps[0].device, memory_format=torch.channels_last)
    return [torch.empty(x.shape, **like) for x in maps]


def launch(
    kernel: str,
    maps: Dict[str, Optional[Tensor]],
    sums: Dict[str, Optional[Tensor]],
    tables: Tuple[Optional[Tensor], Optional[Tensor]],
    window: Window,
    writes: Tuple[str, ...],
) -> Launch:
    """Lay out a launch.

    Args:
        kernel: One of KERNELS.
        maps: By the names that they have in `Arguments`; each fits. Value has the strides of key, and its
            gradient those of key's.
        sums: The same for contiguous tensors in float32.
        tables: rel_row and rel_col, contiguous, or None.
        window: The attention's options.
        writes: The names of what is written.
    """
    query = maps['query']
    _, channels, height, width = query.shape
    depth = channels // window.num_heads
    across, pieces, length, blocks = cut(query, window)
    given = {**maps, **sums, 'rel_row': tables[0], 'rel_col': tables[1]}
    there = {name: x for name, x in given.items() if x is not None}
    shared = tables[0] is None or tables[0].shape[0] == 1
    factor = window.scale * _LOG2_E
    arguments = Arguments(
        height=height,
        width=width,
        heads=window.num_heads,
        dilation=window.dilation_in(height, width),
        across=across,
        pieces=pieces,
        length=length,
        table_stride=0 if shared else depth // 2 * window.kernel_size,
        scale=window.scale,
        factor=factor,
        inverse=1 / factor,
    )
    for name, x in there.items():
        if name in _MAPS:
            image, _, row, col = _strides(x)
            setattr(arguments, name, Map(x.data_ptr(), image, row, col))
        else:
            setattr(arguments, name, x.data_ptr())
    if maps.get('key') is None:
        arguments.key = arguments.value
    if maps.get('grad_key') is None:
        arguments.grad_key = arguments.grad_value
    return Launch(
        kernel,
        variant_of(query, maps.get('key'), tables[0], window),
        query.shape[0] * window.num_heads * blocks,
        arguments,
        tuple(x for name, x in there.items() if name not in writes),
        tuple(x for name, x in there.items() if name in writes),
    )


def empty_partials(query: Tensor, rel_row: Tensor, window: Window) -> Tensor:
    """Allocate each block's part of the tables' gradients.

    Args:
        query: (B, C, H, W).
        rel_row: A table.
        window: The attention's options.

    Returns:
        (B, num_heads, blocks, 2, depth / 2, k) in float32, for rel_row and rel_col.
    """
    shape = (query.shape[0], window.num_heads, cut(query, window).blocks, 2, *rel_row.shape[1:])
    return query.new_empty(shape, dtype=torch.float32)


def sum_partials(partials: Tensor, table: Tensor) -> Tuple[Tensor, Tensor]:
    """Sum the blocks' parts: the gradients of rel_row and rel_col, of a table's shape and type.

    Args:
        partials: From `empty_partials`.
        table: rel_row or rel_col.
    """
    over = (0, 1, 2) if table.shape[0] == 1 else (0, 2)
    total = partials.sum(over, keepdim=True)[0, :, 0]
    # Copied, as contiguous() leaves the odd stride of a dimension of size one, which DDP warns of.
    return tuple(
        x.to(table.dtype).clone(memory_format=torch.contiguous_format) for x in total.unbind(1)
    )
