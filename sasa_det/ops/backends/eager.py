"""Local attention in tiled PyTorch with an explicit backward: runs wherever torch runs.

The map is cut into tiles of queries. The logits of a tile against its halo of keys are one dense matrix
product. A large negative bias masks what lies outside of a query's window. Some entries of the product are
thus discarded. But the halos of a 7 x 7 window hold 6 copies of a key, where unfolding holds 49. Tiles are
computed in chunks, so that the memory in use does not grow with the map.
"""

from dataclasses import dataclass
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..window import Window, compute_dtype, empty_logsumexp, empty_output

# Height and width of a tile of queries, and the most bytes that one chunk's logits may take.
TILE = 4
CHUNK_BYTES = 8 << 20


def missing() -> None:
    """Report nothing missing: this backend is plain PyTorch."""


def refuse(query: Tensor, window: Window) -> None:
    """Report every input as supported."""


def forward(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
) -> Tuple[Tensor, Tensor]:
    """Compute the attention.

    Args:
        query, key, value, rel_row, rel_col, window: As in :func:`sasa_det.ops.local_attention`,
            validated.

    Returns:
        The output (B, C, H, W) and the log-sum-exp of the logits (B, num_heads, H, W).
    """
    dtype = compute_dtype(query.dtype)
    output = empty_output(query)
    logsumexp = empty_logsumexp(query, window.num_heads)
    row, col = _tables(rel_row, rel_col, window, dtype)
    for phase in _phases(window.dilation_in(*query.shape[2:])):
        q_map, k_map, v_map, out_map, lse_map = (
            _phase(x, phase) for x in (query, key, value, output, logsumexp)
        )
        for tiling in _tilings(q_map, window):
            q = tiling.queries(q_map, dtype) * window.scale
            logits, _ = _logits(tiling, q, k_map, row, col, dtype)
            peak = logits.amax(-1, keepdim=True)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            values = tiling.halos(v_map, dtype)
            tiling.store(out_map, torch.bmm(weights, values.transpose(1, 2)) / total)
            tiling.store(lse_map, peak + total.log())
    return output, logsumexp


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
    """Compute the gradients.

    The attention weights are recomputed from ``logsumexp``; the forward saved nothing of a window's
    size.

    Args:
        grad: The gradient of the output.
        query, key, value, rel_row, rel_col, window: As in :func:`forward`.
        logsumexp: As :func:`forward` returned it.
        grad_maps: Tensors for the gradients of query, key (None if there is none) and value, of the same
            shape and type, in any layout.

    Returns:
        The gradients of rel_row and rel_col, None where there are none.
    """
    dtype = compute_dtype(query.dtype)
    grad_query = grad_maps[0]
    # Halos overlap, so these two are sums, and are kept in the compute type.
    grad_value = torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
    grad_key = None if key is None else torch.zeros_like(grad_value)
    row, col = _tables(rel_row, rel_col, window, dtype)
    grad_row = None if row is None else torch.zeros_like(row)
    grad_col = None if col is None else torch.zeros_like(col)
    half = query.shape[1] // window.num_heads // 2

    for phase in _phases(window.dilation_in(*query.shape[2:])):
        q_map, k_map, v_map, g_map, lse_map, gq_map, gk_map, gv_map = (
            _phase(x, phase)
            for x in (
                query, key, value, grad, logsumexp, grad_query, grad_key, grad_value,
            )
        )  # fmt: skip
        for tiling in _tilings(q_map, window):
            q = tiling.queries(q_map, dtype) * window.scale
            g = tiling.queries(g_map, dtype)
            values = tiling.halos(v_map, dtype)

            logits, keys = _logits(tiling, q, k_map, row, col, dtype)
            weights = logits.sub_(tiling.queries(lse_map, dtype)).exp_()
            tiling.add_halos(gv_map, torch.bmm(g.transpose(1, 2), weights))
            # d logits = weights * (d weights - sum of weights * d weights)
            grad_logits = torch.bmm(g, values).mul_(weights)
            grad_logits.sub_(weights.mul_(grad_logits.sum(-1, keepdim=True)))
            grad_q = torch.zeros_like(q)
            if keys is not None:
                grad_q = torch.bmm(grad_logits, keys.transpose(1, 2))
                tiling.add_halos(gk_map, torch.bmm(q.transpose(1, 2), grad_logits))
            if row is not None:
                by_row, by_col = tiling.gather_bias(grad_logits)
                q, by_head = tiling.by_head(q), tiling.by_head(grad_q)
                by_head[..., :half] += by_row @ row.transpose(1, 2)
                by_head[..., half:] += by_col @ col.transpose(1, 2)
                grad_row += (q[..., :half].transpose(-1, -2) @ by_row).sum(0)
                grad_col += (q[..., half:].transpose(-1, -2) @ by_col).sum(0)
            tiling.store(gq_map, grad_q * window.scale)

    if row is not None:
        grad_row, grad_col = (
            (x.sum(0, keepdim=True) if table.shape[0] == 1 else x).to(table.dtype)
            for x, table in ((grad_row, rel_row), (grad_col, rel_col))
        )
    for to, total in zip(grad_maps[1:], (grad_key, grad_value)):
        if to is not None:
            to.copy_(total)
    return grad_row, grad_col


def _logits(
    tiling: '_Tiling',
    q: Tensor,
    k_map: Optional[Tensor],
    row: Optional[Tensor],
    col: Optional[Tensor],
    dtype: torch.dtype,
) -> Tuple[Tensor, Optional[Tensor]]:
    """Compute each tile's logits (N, queries, halo), and return the halo of keys that it read."""
    if row is None:
        by_row = by_col = q.new_zeros(*q.shape[:2], tiling.window.kernel_size)
    else:
        half = row.shape[1]
        by_row = tiling.by_head(q)[..., :half] @ row
        by_col = tiling.by_head(q)[..., half:] @ col
    logits = tiling.spread_bias(by_row, by_col)
    if k_map is None:
        return logits, None
    keys = tiling.halos(k_map, dtype)
    return logits.baddbmm_(q, keys), keys


def _tables(
    rel_row: Optional[Tensor], rel_col: Optional[Tensor], window: Window, dtype: torch.dtype
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Expand relative positions to all heads, in a given type; None if there are none."""
    return tuple(
        None if x is None else x.to(dtype).expand(window.num_heads, -1, -1).contiguous()
        for x in (rel_row, rel_col)
    )


def _phases(dilation: int) -> Iterator[Tuple[int, int, int]]:
    """Split a dilated attention into dilation**2 undilated ones, each on every dilation-th pixel."""
    for y in range(dilation):
        for x in range(dilation):
            yield y, x, dilation


def _phase(x: Optional[Tensor], phase: Tuple[int, int, int]) -> Optional[Tensor]:
    first_row, first_col, step = phase
    return None if x is None else x[:, :, first_row::step, first_col::step]


def _tilings(query: Tensor, window: Window) -> Iterator['_Tiling']:
    """Cut a batch of maps into chunks of tiles."""
    batch, _, height, width = query.shape
    if query.numel() == 0:
        return
    # Tiles of equal size need less padding than full ones and a remainder.
    tile_rows, tile_cols = -(-height // TILE), -(-width // TILE)
    tile = (-(-height // tile_rows), -(-width // tile_cols))
    halo = [t + 2 * (window.kernel_size // 2) for t in tile]
    itemsize = torch.finfo(compute_dtype(query.dtype)).bits // 8
    row_bytes = window.num_heads * tile_cols * tile[0] * tile[1] * halo[0] * halo[1] * itemsize
    rows = min(max(CHUNK_BYTES // row_bytes, 1), tile_rows)
    images = max(CHUNK_BYTES // (row_bytes * tile_rows), 1)
    for image in range(0, batch, images):
        for row in range(0, tile_rows, rows):
            yield _Tiling(
                window=window,
                images=slice(image, min(image + images, batch)),
                top=row * tile[0],
                tiles=(min(rows, tile_rows - row), tile_cols),
                tile=tile,
                map_size=(height, width),
            )


@dataclass(frozen=True)
class _Tiling:
    """A chunk of tiles; N counts image, head, tile row, tile column, in this order."""

    window: Window
    images: slice
    top: int
    tiles: Tuple[int, int]
    tile: Tuple[int, int]
    map_size: Tuple[int, int]

    @property
    def radius(self) -> int:
        return self.window.kernel_size // 2

    @property
    def halo(self) -> Tuple[int, int]:
        return self.tile[0] + 2 * self.radius, self.tile[1] + 2 * self.radius

    @property
    def covered(self) -> Tuple[int, int]:
        """Rows and columns that the tiles cover, including those outside of the map."""
        return self.tiles[0] * self.tile[0], self.tiles[1] * self.tile[1]

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.window.num_heads, -1))

    def queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut tiles out of a map: (B, heads * c, H, W) to (N, queries, c)."""
        x = x[self.images, :, self.top : self.top + self.covered[0]].to(dtype)
        x = F.pad(x, (0, self.covered[1] - x.shape[3], 0, self.covered[0] - x.shape[2]))
        x = self._split_heads(x)
        x = x.unflatten(4, (self.tiles[1], self.tile[1])).unflatten(
            3, (self.tiles[0], self.tile[0])
        )
        x = x.permute(0, 1, 3, 5, 4, 6, 2)
        return x.reshape(-1, self.tile[0] * self.tile[1], x.shape[-1])

    def store(self, x: Tensor, tiles: Tensor) -> None:
        """Write tiles (N, queries, c) into their place in a map; the reverse of ``queries``."""
        tiles = tiles.reshape(-1, self.window.num_heads, *self.tiles, *self.tile, tiles.shape[-1])
        tiles = tiles.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        rows = min(self.covered[0], self.map_size[0] - self.top)
        target = x[self.images, :, self.top : self.top + rows]
        target.copy_(tiles[:, :, :rows, : self.map_size[1]])

    def _halo_rows(self) -> Tuple[int, int, int, int]:
        """First and last row of the map under the halos, and the number of rows missing at either end."""
        first, last = self.top - self.radius, self.top + self.covered[0] + self.radius
        low, high = max(first, 0), min(last, self.map_size[0])
        return low, high, low - first, last - high

    def halos(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut halos of keys or values out of a map: (B, heads * c, H, W) to (N, c, halo)."""
        low, high, above, below = self._halo_rows()
        x = x[self.images, :, low:high].to(dtype)
        right = self.covered[1] + self.radius - self.map_size[1]
        x = self._split_heads(F.pad(x, (self.radius, right, above, below)))
        x = x.unfold(3, self.halo[0], self.tile[0]).unfold(4, self.halo[1], self.tile[1])
        x = x.permute(0, 1, 3, 4, 2, 5, 6)
        return x.reshape(-1, x.shape[4], self.halo[0] * self.halo[1])

    def add_halos(self, x: Tensor, halos: Tensor) -> None:
        """Add halos (N, c, halo) to their place in a map, overlaps summed; the transpose of ``halos``."""
        heads, depth = self.window.num_heads, halos.shape[1]
        halos = halos.view(-1, heads, *self.tiles, depth, *self.halo).permute(0, 1, 4, 2, 3, 5, 6)
        rows, cols = self.covered
        total = halos.new_zeros(
            halos.shape[0], heads, depth, rows + 2 * self.radius, cols + 2 * self.radius
        )
        # Blocks no larger than a tile do not overlap each other, so each offset takes one plain addition.
        for top in range(0, self.halo[0], self.tile[0]):
            for left in range(0, self.halo[1], self.tile[1]):
                piece = halos[..., top : top + self.tile[0], left : left + self.tile[1]]
                height, width = piece.shape[-2:]
                place = total[..., top:, left:]
                place = place[..., : rows - self.tile[0] + height, : cols - self.tile[1] + width]
                place.unfold(3, height, self.tile[0]).unfold(4, width, self.tile[1]).add_(piece)
        low, high, above, _ = self._halo_rows()
        left, right = self.radius, self.radius + self.map_size[1]
        x[self.images, :, low:high] += total.flatten(1, 2)[
            :, :, above : above + high - low, left:right
        ]

    def by_head(self, tiles: Tensor) -> Tensor:
        """View tiles (N, queries, c) as (images, heads, tiles * queries, c)."""
        return tiles.view(
            -1,
            self.window.num_heads,
            self.tiles[0] * self.tiles[1] * tiles.shape[1],
            tiles.shape[-1],
        )

    def spread_bias(self, by_row: Tensor, by_col: Tensor) -> Tensor:
        """Spread a query's k row and k column terms over its halo, and mask all but its window.

        Returns:
            (N, queries, halo), large and negative at masked positions.
        """
        closed = torch.finfo(by_row.dtype).min / 8
        by_row = by_row.reshape(-1, *self.tiles, *self.tile, by_row.shape[-1]).transpose(3, 4)
        by_col = by_col.reshape(-1, *self.tiles, *self.tile, by_col.shape[-1])
        by_row = _shift_right(by_row, self.halo[0], closed)
        by_col = _shift_right(by_col, self.halo[1], closed)
        if self.window.border == 'mask':
            for by, axis, first in ((by_row, 0, self.top), (by_col, 1, 0)):
                place = torch.arange(self.tiles[axis], device=by.device)[:, None] * self.tile[axis]
                place = place + torch.arange(self.halo[axis], device=by.device)
                place = place + first - self.radius
                outside = (place < 0) | (place >= self.map_size[axis])
                outside = outside[:, None] if axis == 0 else outside
                by += closed * outside[:, None, None].to(by.dtype)
        terms = torch.cat((by_row.transpose(3, 4), by_col), dim=-1)
        terms = terms.reshape(-1, self.tile[0] * self.tile[1], terms.shape[-1])
        return terms @ self._selection(terms)

    def gather_bias(self, grad: Tensor) -> Tuple[Tensor, Tensor]:
        """Sum a gradient (N, queries, halo) per window row and per column; the transpose of ``spread_bias``."""
        terms = grad @ self._selection(grad).t()
        terms = terms.view(-1, *self.tile, terms.shape[-1])
        by_row, by_col = terms.split(self.halo, dim=-1)
        by_row = _shift_left(by_row.transpose(1, 2), self.window.kernel_size).transpose(1, 2)
        by_col = _shift_left(by_col, self.window.kernel_size)
        queries = self.tile[0] * self.tile[1]
        return tuple(
            self.by_head(x.reshape(-1, queries, self.window.kernel_size)) for x in (by_row, by_col)
        )

    def _selection(self, like: Tensor) -> Tensor:
        """Zeros and ones that add to each halo position the term of its row and that of its column."""
        rows, cols = self.halo
        select = like.new_zeros(rows + cols, rows, cols)
        select[:rows] = torch.eye(rows, dtype=like.dtype, device=like.device)[:, :, None]
        select[rows:] = torch.eye(cols, dtype=like.dtype, device=like.device)[:, None]
        return select.flatten(1)


def _shift_right(x: Tensor, length: int, fill: float) -> Tensor:
    """Widen (..., queries, k) to (..., queries, length), query i's terms from column i on."""
    queries = x.shape[-2]
    x = F.pad(x, (0, length + 1 - x.shape[-1]), value=fill)
    return x.flatten(-2)[..., : queries * length].unflatten(-1, (queries, length))


def _shift_left(x: Tensor, size: int) -> Tensor:
    """Narrow (..., queries, length) to (..., queries, k); the reverse of ``_shift_right``."""
    queries, length = x.shape[-2:]
    x = F.pad(x.flatten(-2), (0, queries)).unflatten(-1, (queries, length + 1))
    return x[..., :size]
