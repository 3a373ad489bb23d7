"""The Triton kernels behind ``backend='triton'``: FlashAttention in which each query has a window of keys.

Formulas, for one head. Query m sees the keys n in the WINDOW x WINDOW pixels around it::

    S[m, n] = SCALE * (Q[m] . K[n] + Q[m] . R[n - m])    logits; there may be no K, or no R
    P[m, n] = exp(S[m, n] - lse[m])                      lse[m] = log sum_n exp(S[m, n])
    O       = P V

    dP = dO V^T                    dS = P * (dP - delta)      delta[m] = sum_n P[m, n] dP[m, n]
    dQ = SCALE * dS (K + R)        dK = SCALE * dS^T Q        dV = P^T dO
    dR[r] = SCALE * sum of dS[m, n] Q[m] over all m and n with n - m = r

R are the relative positions. The first half of a head's channels depends on the key's row in the window
alone (rel_row), the second half on its column alone (rel_col). So Q . R is a term by row plus one by column.
Keys out of the map are zeros that take part, unless MASK_BORDER leaves them out.

Tiles. A program takes one tile of one head: TILE_H x TILE_W pixels of the map. The tile's halo is every pixel
that a window around the tile reaches: TILE_H + WINDOW - 1 rows of TILE_W + WINDOW - 1. The program loops over
the rows of the halo. The whole tile against one row of the halo is one product on the matrix units.
Its pairs of pixels that share no window get a logit of -inf.

Blocks. M is queries and N is keys, in every kernel. A block's shape stands in a comment beside it::

    BLOCK_M    the tile; in backward_dkdv_kernel a row of the halo
    BLOCK_N    a row of the halo; in backward_dkdv_kernel the tile
    BLOCK_D    the HEAD_DIM channels of a head
    BLOCK_R    the WINDOW offsets of rows, or of columns, in a window: 0 is its first, RADIUS its centre

Each is the power of two that holds what it is for, and at least 16, as the matrix units want it.

Base 2. The GPU computes exp2 and not exp. So the logits that the kernels hold are log2(e) * S, and the
log-sum-exp that they store is log2(e) * lse. Nothing but this backend's own backward reads it. P and all
gradients, dS included, are those of the formulas.

Dilation. With a dilation of r the map falls into r * r interleaved maps, the phases, which never meet. A tile
lies in one phase, so its pixels are r apart in the map.

Strides. stride_qb, stride_qc, stride_qh and stride_qw are q's from image to image, channel to channel, row to
row and column to column. All but the channels' count UNIT elements. So the compiler knows that loads from
channels_last maps are aligned, whatever the map's size. Nothing that changes with the size of an image is
specialised on, so that no new size compiles anew.
"""

import triton
import triton.language as tl

_MAPS = ('q', 'k', 'v', 'o', 'do', 'dq', 'dk', 'dv')
_VARYING = ['height', 'width', 'num_tiles', 'num_heads']
_VARYING += [f'stride_{name}{axis}' for name in _MAPS for axis in 'bh']
_UNALIGNED = [f'stride_{name}{axis}' for name in _MAPS for axis in 'cw']
_jit = triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)

# Below every logit, and finite: the difference of two of them is a number.
_LOWEST = tl.constexpr(-1e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Tiles' partial sums of dR are summed in chunks of so many first, by sum_rel_partials in triton_launches.py.
CHUNK = tl.constexpr(16)


@triton.jit
def _tile_origin(tile, height, width, dilation, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Find the row and the column of a tile's first pixel in the map."""
    tiles_across = tl.cdiv(tl.cdiv(width, dilation), TILE_W)
    tiles_down = tl.cdiv(tl.cdiv(height, dilation), TILE_H)
    row, col = (tile // tiles_across) % tiles_down, tile % tiles_across
    phase = tile // (tiles_across * tiles_down)
    phases_across = tl.minimum(dilation, width)
    top = phase // phases_across + row * TILE_H * dilation
    return top, phase % phases_across + col * TILE_W * dilation


_INTERPRETED = tl.constexpr(not isinstance(_tile_origin, triton.JITFunction))


@triton.jit
def _tile_pixels(
    offs, top, left, height, width, dilation, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Find a tile's pixels in the map: rows, columns, and a mask of those that are there.

    Not there are those that pad the tile to the block, and those out of the map.
    """
    rows, cols = top + offs // TILE_W * dilation, left + offs % TILE_W * dilation
    return rows, cols, (offs < TILE_H * TILE_W) & (rows < height) & (cols < width)


@triton.jit
def _halo_cols(offs, left, width, dilation, RADIUS: tl.constexpr):
    """Find the columns of a row of the halo in the map, and a mask of those that are in it."""
    cols = left + (offs - RADIUS) * dilation
    return cols, (cols >= 0) & (cols < width)


@triton.jit
def _row_in_map(row, height):
    """Say whether a row lies in the map, as a block (1,).

    Not as a scalar: Triton 3.9's interpreter makes integers of a scalar condition. It compiles to the
    same registers.
    """
    row += tl.zeros((1,), tl.int32)
    return (row >= 0) & (row < height)


@triton.jit
def _head_ptr(ptr, image, head, stride_b, stride_c, HEAD_DIM: tl.constexpr, UNIT: tl.constexpr):
    """Point to the first channel of a head of an image, at the map's first pixel."""
    return ptr + image.to(tl.int64) * stride_b * UNIT + head.to(tl.int64) * HEAD_DIM * stride_c


@triton.jit
def _pixel_offsets(
    rows, cols, stride_c, stride_h, stride_w,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, OFFSET_DTYPE: tl.constexpr,
):  # fmt: skip
    """Lay out where pixels' channels lie, from a `_head_ptr`: (BLOCK,) to (BLOCK, BLOCK_D)."""
    offsets = rows.to(OFFSET_DTYPE) * stride_h * UNIT
    offsets += cols.to(OFFSET_DTYPE) * stride_w * UNIT
    return offsets[:, None] + (tl.arange(0, BLOCK_D).to(OFFSET_DTYPE) * stride_c)[None, :]


@triton.jit
def _load(
    ptr, rows, cols, mask, stride_c, stride_h, stride_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
):  # fmt: skip
    """Load pixels' channels (BLOCK, BLOCK_D) from a `_head_ptr`, zeros where masked."""
    offsets = _pixel_offsets(rows, cols, stride_c, stride_h, stride_w, BLOCK_D, UNIT, OFFSET_DTYPE)
    mask = mask[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _store(
    ptr, block, rows, cols, mask, stride_c, stride_h, stride_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr,
):  # fmt: skip
    """Store pixels' channels (BLOCK, BLOCK_D) at a `_head_ptr`, but where masked."""
    offsets = _pixel_offsets(rows, cols, stride_c, stride_h, stride_w, BLOCK_D, UNIT, OFFSET_DTYPE)
    mask = mask[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(ptr + offsets, block.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_ptrs(
    ptr, cols, stride_c, stride_h, stride_w,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, OFFSET_DTYPE: tl.constexpr,
):  # fmt: skip
    """Point from a `_head_ptr` to channels of pixels in row 0 of the map: (BLOCK,) to (BLOCK, BLOCK_D)."""
    return ptr + _pixel_offsets(
        cols * 0, cols, stride_c, stride_h, stride_w, BLOCK_D, UNIT, OFFSET_DTYPE
    )


@triton.jit
def _load_row(row_ptrs, row, mask, stride_h, UNIT: tl.constexpr, OFFSET_DTYPE: tl.constexpr):
    """Load what `_row_ptrs` point to, of another row of the map: (BLOCK, BLOCK_D)."""
    return tl.load(row_ptrs + row.to(OFFSET_DTYPE) * stride_h * UNIT, mask=mask, other=0.0)


@triton.jit
def _load_rel(
    ptr, head, FIRST: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, REL_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Load a head's rel_row (FIRST is 0) or rel_col (FIRST is HEAD_DIM // 2): (BLOCK_D, BLOCK_R).

    The half of the channels that it is not for is zero, so that q needs no cutting into halves.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_d = tl.arange(0, BLOCK_D) - FIRST
    offs_r = tl.arange(0, BLOCK_R)
    if REL_PER_HEAD:
        ptr += head * HALF * WINDOW
    mask = ((offs_d >= 0) & (offs_d < HALF))[:, None] & (offs_r < WINDOW)[None, :]
    return tl.load(ptr + offs_d[:, None] * WINDOW + offs_r[None, :], mask=mask, other=0.0)


@triton.jit
def _dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """Multiply matrices, and add the product to an accumulator unless that is None."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter would multiply the bits.
        a, b = a.to(tl.float32), b.to(tl.float32)
    ACC_DTYPE: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b, acc=acc, input_precision=INPUT_PRECISION, out_dtype=ACC_DTYPE)


@triton.jit
def _col_offsets(
    offs_m, offs_n, col_in_map_n,
    WINDOW: tl.constexpr, TILE_W: tl.constexpr, MASK_BORDER: tl.constexpr,
):  # fmt: skip
    """Find each key's column in each query's window, and which of them are in it: (BLOCK_M, BLOCK_N)."""
    col_offset = offs_n[None, :] - (offs_m % TILE_W)[:, None]
    in_window = (col_offset >= 0) & (col_offset < WINDOW)
    if MASK_BORDER:
        in_window &= col_in_map_n[None, :]
    return col_offset, in_window


@triton.jit
def _offsets_to_keys(by_offset, col_offset, WINDOW: tl.constexpr, BLOCK_R: tl.constexpr):
    """Give each key what its column offset has: (BLOCK_M, BLOCK_R) to (BLOCK_M, BLOCK_N).

    Not by tl.gather, which takes a hundred registers for it.
    """
    by_key = col_offset.to(by_offset.dtype) * 0
    for r in range(0, WINDOW):
        column = tl.sum(tl.where((tl.arange(0, BLOCK_R) == r)[None, :], by_offset, 0.0), 1)
        by_key = tl.where(col_offset == r, column[:, None], by_key)
    return by_key


@triton.jit
def _keys_to_offsets(by_key, col_offset, WINDOW: tl.constexpr, BLOCK_R: tl.constexpr):
    """Give each column offset what its key has: (BLOCK_M, BLOCK_N) to (BLOCK_M, BLOCK_R)."""
    by_offset = tl.zeros((by_key.shape[0], BLOCK_R), by_key.dtype)
    for r in range(0, WINDOW):
        column = tl.sum(tl.where(col_offset == r, by_key, 0.0), 1)
        by_offset = tl.where((tl.arange(0, BLOCK_R) == r)[None, :], column[:, None], by_offset)
    return by_offset


@triton.jit
def _col_bias(
    q, rel_col, col_offset, col_in_window,
    QK_SCALE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_R: tl.constexpr, ACC_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what every row of the halo adds to the logits: (BLOCK_M, BLOCK_N).

    That is the term by column, and -inf where the key's column is not in the query's window.
    """
    bias = tl.zeros(col_offset.shape, ACC_DTYPE)
    if rel_col is not None:
        qr_col = _dot(q, rel_col, None, INPUT_PRECISION) * QK_SCALE  # (BLOCK_M, BLOCK_R)
        bias = _offsets_to_keys(qr_col, col_offset, WINDOW, BLOCK_R)
    return tl.where(col_in_window, bias, float('-inf'))


@triton.jit
def _logits(
    q, k, qr_row, col_bias, row_offset, row_in_map,
    QK_SCALE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_R: tl.constexpr,
    MASK_BORDER: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute S of a tile of queries against a row of keys, -inf out of the windows.

    Args:
        q: (BLOCK_M, BLOCK_D).
        k: (BLOCK_N, BLOCK_D), or None.
        qr_row: (BLOCK_M, BLOCK_R), the terms by row, or None.
        col_bias: (BLOCK_M, BLOCK_N), from `_col_bias`.
        row_offset: (BLOCK_M,), which row of the query's window the keys are, if any.
        row_in_map: (1,), whether the keys lie in the map.

    Returns:
        (BLOCK_M, BLOCK_N)
    """
    row_in_window = (row_offset >= 0) & (row_offset < WINDOW)
    if MASK_BORDER:
        row_in_window &= row_in_map
    if qr_row is None:
        s = tl.where(row_in_window[:, None], col_bias, float('-inf'))
    else:
        is_row = tl.arange(0, BLOCK_R)[None, :] == row_offset[:, None]  # (BLOCK_M, BLOCK_R)
        row_bias = tl.sum(tl.where(is_row, qr_row, 0.0), 1)  # (BLOCK_M,)
        s = col_bias + tl.where(row_in_window, row_bias, float('-inf'))[:, None]
    if k is not None:
        s += _dot(q, tl.trans(k), None, INPUT_PRECISION) * QK_SCALE
    return s


@_jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, rel_row_ptr, rel_col_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qc, stride_qh, stride_qw, stride_kb, stride_kc, stride_kh, stride_kw,
    stride_vb, stride_vc, stride_vh, stride_vw, stride_ob, stride_oc, stride_oh, stride_ow,
    height, width, num_heads, dilation, num_tiles,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_BORDER: tl.constexpr,
    HAS_K: tl.constexpr, HAS_REL: tl.constexpr, REL_PER_HEAD: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr, ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute O and lse.

    A program is a tile of queries. It walks down the rows of keys in the tile's halo, with FlashAttention's
    online softmax. Of the keys so far, m_i is the highest logit, l_i the sum of exp(S - m_i)::

        m_new = max(m_i, max_n S)           p = exp(S - m_new)          alpha = exp(m_i - m_new)
        l_i = alpha * l_i + sum_n p         acc = alpha * acc + p V     m_i = m_new

    and at the end O = acc / l_i and lse = m_i + log l_i.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    QK_SCALE: tl.constexpr = SCALE * _LOG2_E
    pid = tl.program_id(0)
    head, image = (pid // num_tiles) % num_heads, pid // num_tiles // num_heads
    top, left = _tile_origin(pid % num_tiles, height, width, dilation, TILE_H, TILE_W)

    offs_m = tl.arange(0, BLOCK_M)
    rows_m, cols_m, mask_m = _tile_pixels(
        offs_m, top, left, height, width, dilation, TILE_H, TILE_W
    )  # (BLOCK_M,) each
    q = _load(
        _head_ptr(q_ptr, image, head, stride_qb, stride_qc, HEAD_DIM, UNIT),
        rows_m, cols_m, mask_m, stride_qc, stride_qh, stride_qw,
        HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    # q: (BLOCK_M, BLOCK_D)

    offs_n = tl.arange(0, BLOCK_N)
    cols_n, col_in_map_n = _halo_cols(offs_n, left, width, dilation, RADIUS)  # (BLOCK_N,)
    mask_nd = col_in_map_n[:, None]  # (BLOCK_N, 1)
    col_offset, col_in_window = _col_offsets(
        offs_m, offs_n, col_in_map_n, WINDOW, TILE_W, MASK_BORDER
    )  # (BLOCK_M, BLOCK_N)
    qr_row = None
    rel_col = None
    if HAS_REL:
        rel_row = _load_rel(
            rel_row_ptr, head, 0, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_R, REL_PER_HEAD
        )  # (BLOCK_D, BLOCK_R)
        qr_row = _dot(q, rel_row, None, INPUT_PRECISION) * QK_SCALE  # (BLOCK_M, BLOCK_R)
        rel_col = _load_rel(
            rel_col_ptr, head, HEAD_DIM // 2, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_R, REL_PER_HEAD
        )  # (BLOCK_D, BLOCK_R)
    col_bias = _col_bias(
        q, rel_col, col_offset, col_in_window,
        QK_SCALE, WINDOW, BLOCK_R, ACC_DTYPE, INPUT_PRECISION,
    )  # fmt: skip
    # col_bias: (BLOCK_M, BLOCK_N)

    mask_nd &= (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]  # (BLOCK_N, BLOCK_D)
    if HAS_K:
        k_ptrs = _row_ptrs(
            _head_ptr(k_ptr, image, head, stride_kb, stride_kc, HEAD_DIM, UNIT),
            cols_n, stride_kc, stride_kh, stride_kw, BLOCK_D, UNIT, OFFSET_DTYPE,
        )  # fmt: skip
    v_ptrs = _row_ptrs(
        _head_ptr(v_ptr, image, head, stride_vb, stride_vc, HEAD_DIM, UNIT),
        cols_n, stride_vc, stride_vh, stride_vw, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    m_i = tl.full((BLOCK_M,), _LOWEST, ACC_DTYPE)
    l_i = tl.zeros((BLOCK_M,), ACC_DTYPE)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC_DTYPE)
    for halo_row in range(0, TILE_H + WINDOW - 1):
        row_n = top + (halo_row - RADIUS) * dilation
        row_in_map = _row_in_map(row_n, height)
        mask = mask_nd & row_in_map
        k = None
        if HAS_K:
            k = _load_row(k_ptrs, row_n, mask, stride_kh, UNIT, OFFSET_DTYPE)  # (BLOCK_N, BLOCK_D)
        s = _logits(
            q, k, qr_row, col_bias, halo_row - offs_m // TILE_W, row_in_map,
            QK_SCALE, WINDOW, BLOCK_R, MASK_BORDER, INPUT_PRECISION,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, 1))  # (BLOCK_M,)
        p = tl.exp2(s - m_new[:, None])  # (BLOCK_M, BLOCK_N), not yet divided by l_i
        alpha = tl.exp2(m_i - m_new)  # (BLOCK_M,)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        v = _load_row(v_ptrs, row_n, mask, stride_vh, UNIT, OFFSET_DTYPE)  # (BLOCK_N, BLOCK_D)
        acc = _dot(p.to(v.dtype), v, acc * alpha[:, None], INPUT_PRECISION)

    # Queries that pad the tile may see no key at all.
    l_i = tl.where(mask_m, l_i, 1.0)
    _store(
        _head_ptr(o_ptr, image, head, stride_ob, stride_oc, HEAD_DIM, UNIT),
        acc / l_i[:, None], rows_m, cols_m, mask_m, stride_oc, stride_oh, stride_ow,
        HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    lse_ptr += (image * num_heads + head).to(tl.int64) * height * width
    tl.store(lse_ptr + rows_m.to(OFFSET_DTYPE) * width + cols_m, m_i + tl.log2(l_i), mask=mask_m)


@_jit
def backward_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, rel_row_ptr, rel_col_ptr, lse_ptr,
    dq_ptr, delta_ptr, drel_partial_ptr,
    stride_dob, stride_doc, stride_doh, stride_dow, stride_qb, stride_qc, stride_qh, stride_qw,
    stride_kb, stride_kc, stride_kh, stride_kw, stride_vb, stride_vc, stride_vh, stride_vw,
    stride_dqb, stride_dqc, stride_dqh, stride_dqw,
    height, width, num_heads, dilation, num_tiles,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_BORDER: tl.constexpr,
    HAS_K: tl.constexpr, HAS_REL: tl.constexpr, REL_PER_HEAD: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr, ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ, delta, and each tile's partial sum of dR.

    A program is a tile of queries. It walks down the rows of keys in the tile's halo twice::

        1.    P = exp(S - lse)          dP = dO V^T                   delta = sum_n P * dP
        2.    dS = P * (dP - delta)     dQ = SCALE * dS (K + R)       dR[r] = SCALE * sum dS[m, n] Q[m]

    FlashAttention has delta from O, as the sum of dO * O over channels. O is not kept here, which takes less
    memory and lets it be changed in place.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    QK_SCALE: tl.constexpr = SCALE * _LOG2_E
    pid = tl.program_id(0)
    head, image = (pid // num_tiles) % num_heads, pid // num_tiles // num_heads
    head_start = (image * num_heads + head).to(tl.int64) * height * width  # in lse and delta
    do_ptr = _head_ptr(do_ptr, image, head, stride_dob, stride_doc, HEAD_DIM, UNIT)
    q_ptr = _head_ptr(q_ptr, image, head, stride_qb, stride_qc, HEAD_DIM, UNIT)
    v_ptr = _head_ptr(v_ptr, image, head, stride_vb, stride_vc, HEAD_DIM, UNIT)
    dq_ptr = _head_ptr(dq_ptr, image, head, stride_dqb, stride_dqc, HEAD_DIM, UNIT)
    if HAS_K:
        k_ptr = _head_ptr(k_ptr, image, head, stride_kb, stride_kc, HEAD_DIM, UNIT)
    offs_d = tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_R)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    rel_col = None
    if HAS_REL:
        rel_row = _load_rel(
            rel_row_ptr, head, 0, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_R, REL_PER_HEAD
        )  # (BLOCK_D, BLOCK_R)
        rel_col = _load_rel(
            rel_col_ptr, head, HEAD_DIM // 2, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_R, REL_PER_HEAD
        )  # (BLOCK_D, BLOCK_R)

    top, left = _tile_origin(pid % num_tiles, height, width, dilation, TILE_H, TILE_W)
    rows_m, cols_m, mask_m = _tile_pixels(
        offs_m, top, left, height, width, dilation, TILE_H, TILE_W
    )  # (BLOCK_M,) each
    q = _load(
        q_ptr, rows_m, cols_m, mask_m, stride_qc, stride_qh, stride_qw,
        HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    do = _load(
        do_ptr, rows_m, cols_m, mask_m, stride_doc, stride_doh, stride_dow,
        HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    # q, do: (BLOCK_M, BLOCK_D)
    pixels_m = head_start + rows_m.to(OFFSET_DTYPE) * width + cols_m  # in lse and delta
    # P of queries that pad the tile comes out as zero.
    lse = tl.load(lse_ptr + pixels_m, mask=mask_m, other=float('inf'))  # (BLOCK_M,)

    cols_n, col_in_map_n = _halo_cols(offs_n, left, width, dilation, RADIUS)  # (BLOCK_N,)
    mask_nd = col_in_map_n[:, None] & (offs_d < HEAD_DIM)[None, :]  # (BLOCK_N, BLOCK_D)
    if HAS_K:
        k_ptrs = _row_ptrs(
            k_ptr, cols_n, stride_kc, stride_kh, stride_kw, BLOCK_D, UNIT, OFFSET_DTYPE
        )
    v_ptrs = _row_ptrs(v_ptr, cols_n, stride_vc, stride_vh, stride_vw, BLOCK_D, UNIT, OFFSET_DTYPE)
    col_offset, col_in_window = _col_offsets(
        offs_m, offs_n, col_in_map_n, WINDOW, TILE_W, MASK_BORDER
    )  # (BLOCK_M, BLOCK_N)
    qr_row = None
    if HAS_REL:
        qr_row = _dot(q, rel_row, None, INPUT_PRECISION) * QK_SCALE  # (BLOCK_M, BLOCK_R)
    col_bias = _col_bias(
        q, rel_col, col_offset, col_in_window,
        QK_SCALE, WINDOW, BLOCK_R, ACC_DTYPE, INPUT_PRECISION,
    )  # fmt: skip
    # col_bias: (BLOCK_M, BLOCK_N)
    delta = tl.zeros((BLOCK_M,), ACC_DTYPE)
    for halo_row in range(0, TILE_H + WINDOW - 1):
        row_n = top + (halo_row - RADIUS) * dilation
        row_in_map = _row_in_map(row_n, height)
        mask = mask_nd & row_in_map
        k = None
        if HAS_K:
            k = _load_row(k_ptrs, row_n, mask, stride_kh, UNIT, OFFSET_DTYPE)  # (BLOCK_N, BLOCK_D)
        s = _logits(
            q, k, qr_row, col_bias, halo_row - offs_m // TILE_W, row_in_map,
            QK_SCALE, WINDOW, BLOCK_R, MASK_BORDER, INPUT_PRECISION,
        )  # fmt: skip
        v = _load_row(v_ptrs, row_n, mask, stride_vh, UNIT, OFFSET_DTYPE)  # (BLOCK_N, BLOCK_D)
        dp = _dot(do, tl.trans(v), None, INPUT_PRECISION)  # (BLOCK_M, BLOCK_N)
        delta += tl.sum(tl.exp2(s - lse[:, None]) * dp, 1)
    tl.store(delta_ptr + pixels_m, delta, mask=mask_m)

    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC_DTYPE)
    if HAS_REL:
        # dS summed over the keys of a row, and over the rows of the halo.
        ds_by_row = tl.zeros((BLOCK_M, BLOCK_R), ACC_DTYPE)
        ds_by_key_col = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for halo_row in range(0, TILE_H + WINDOW - 1):
        row_n = top + (halo_row - RADIUS) * dilation
        row_in_map = _row_in_map(row_n, height)
        mask = mask_nd & row_in_map
        k = None
        if HAS_K:
            k = _load_row(k_ptrs, row_n, mask, stride_kh, UNIT, OFFSET_DTYPE)  # (BLOCK_N, BLOCK_D)
        s = _logits(
            q, k, qr_row, col_bias, halo_row - offs_m // TILE_W, row_in_map,
            QK_SCALE, WINDOW, BLOCK_R, MASK_BORDER, INPUT_PRECISION,
        )  # fmt: skip
        v = _load_row(v_ptrs, row_n, mask, stride_vh, UNIT, OFFSET_DTYPE)  # (BLOCK_N, BLOCK_D)
        dp = _dot(do, tl.trans(v), None, INPUT_PRECISION)  # (BLOCK_M, BLOCK_N)
        ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])  # (BLOCK_M, BLOCK_N)
        if HAS_K:
            dq = _dot(ds.to(k.dtype), k, dq, INPUT_PRECISION)
        if HAS_REL:
            ds_by_key_col += ds
            is_row = offs_r[None, :] == (halo_row - offs_m // TILE_W)[:, None]  # (BLOCK_M, BLOCK_R)
            ds_by_row += tl.where(is_row, tl.sum(ds, 1)[:, None], 0.0)

    if HAS_REL:
        ds_by_col = _keys_to_offsets(
            ds_by_key_col, col_offset, WINDOW, BLOCK_R
        )  # (BLOCK_M, BLOCK_R)
        ds_row = ds_by_row.to(q.dtype)  # (BLOCK_M, BLOCK_R)
        ds_col = ds_by_col.to(q.dtype)  # (BLOCK_M, BLOCK_R)
        dq = _dot(ds_row, tl.trans(rel_row), dq, INPUT_PRECISION)
        dq = _dot(ds_col, tl.trans(rel_col), dq, INPUT_PRECISION)
        # (BLOCK_R, BLOCK_D) has fewer than 64 rows. Its transpose has 64 where a head has 64 channels: Triton
        # 3.6 then takes Hopper's asynchronous products, and stores the first of the two at random.
        drel_row = _dot(tl.trans(ds_row), q, None, INPUT_PRECISION)
        drel_col = _dot(tl.trans(ds_col), q, None, INPUT_PRECISION)
    _store(
        dq_ptr, dq * SCALE, rows_m, cols_m, mask_m, stride_dqc, stride_dqh, stride_dqw,
        HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip

    if HAS_REL:
        # A tile's partial sum is (2, HALF, WINDOW) in memory: of rel_row, then of rel_col.
        HALF: tl.constexpr = HEAD_DIM // 2
        slot = pid // num_tiles * (tl.cdiv(num_tiles, CHUNK) * CHUNK) + pid % num_tiles
        drel_partial_ptr += slot.to(tl.int64) * 2 * HALF * WINDOW
        # The channels of rel_col are the second half there, too.
        offsets = offs_d[None, :] * WINDOW + offs_r[:, None]  # (BLOCK_R, BLOCK_D)
        mask_r = (offs_r < WINDOW)[:, None]
        tl.store(
            drel_partial_ptr + offsets, drel_row * SCALE, mask=mask_r & (offs_d < HALF)[None, :]
        )
        second_half = ((offs_d >= HALF) & (offs_d < HEAD_DIM))[None, :]
        tl.store(drel_partial_ptr + offsets, drel_col * SCALE, mask=mask_r & second_half)


@_jit
def backward_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, rel_row_ptr, rel_col_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    stride_dob, stride_doc, stride_doh, stride_dow, stride_qb, stride_qc, stride_qh, stride_qw,
    stride_kb, stride_kc, stride_kh, stride_kw, stride_vb, stride_vc, stride_vh, stride_vw,
    stride_dkb, stride_dkc, stride_dkh, stride_dkw, stride_dvb, stride_dvc, stride_dvh, stride_dvw,
    height, width, num_heads, dilation, num_tiles,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_BORDER: tl.constexpr,
    HAS_K: tl.constexpr, HAS_REL: tl.constexpr, REL_PER_HEAD: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    OFFSET_DTYPE: tl.constexpr, ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV.

    A program is a tile of keys. It walks down the rows of queries in the tile's halo, and holds S and its
    like transposed, as sT = S^T::

        P^T = exp(S^T - lse)                dV = P^T dO
        dS^T = P^T * (V dO^T - delta)       dK = SCALE * dS^T Q
    """
    RADIUS: tl.constexpr = WINDOW // 2
    QK_SCALE: tl.constexpr = SCALE * _LOG2_E
    pid = tl.program_id(0)
    head, image = (pid // num_tiles) % num_heads, pid // num_tiles // num_heads
    top, left = _tile_origin(pid % num_tiles, height, width, dilation, TILE_H, TILE_W)

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    rows_n, cols_n, mask_n = _tile_pixels(
        offs_n, top, left, height, width, dilation, TILE_H, TILE_W
    )  # (BLOCK_N,) each
    v = _load(
        _head_ptr(v_ptr, image, head, stride_vb, stride_vc, HEAD_DIM, UNIT),
        rows_n, cols_n, mask_n, stride_vc, stride_vh, stride_vw,
        HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    if HAS_K:
        k = _load(
            _head_ptr(k_ptr, image, head, stride_kb, stride_kc, HEAD_DIM, UNIT),
            rows_n, cols_n, mask_n, stride_kc, stride_kh, stride_kw,
            HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
        )  # fmt: skip
    # k, v: (BLOCK_N, BLOCK_D)

    offs_m = tl.arange(0, BLOCK_M)
    cols_m, col_in_map_m = _halo_cols(offs_m, left, width, dilation, RADIUS)  # (BLOCK_M,)
    mask_md = col_in_map_m[:, None] & (offs_d < HEAD_DIM)[None, :]  # (BLOCK_M, BLOCK_D)
    q_ptrs = _row_ptrs(
        _head_ptr(q_ptr, image, head, stride_qb, stride_qc, HEAD_DIM, UNIT),
        cols_m, stride_qc, stride_qh, stride_qw, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    do_ptrs = _row_ptrs(
        _head_ptr(do_ptr, image, head, stride_dob, stride_doc, HEAD_DIM, UNIT),
        cols_m, stride_doc, stride_doh, stride_dow, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    head_start = (image * num_heads + head).to(tl.int64) * height * width
    # As `_row_ptrs` to row 0, but (BLOCK_M,).
    lse_ptrs = lse_ptr + (head_start + cols_m)
    delta_ptrs = delta_ptr + (head_start + cols_m)

    # The key's column in the query's window. The halo begins RADIUS to the left of the tile.
    col_offset = (offs_n % TILE_W)[:, None] - offs_m[None, :] + 2 * RADIUS  # (BLOCK_N, BLOCK_M)
    col_in_window = (col_offset >= 0) & (col_offset < WINDOW)
    if HAS_REL:
        rel_rowT = tl.trans(
            _load_rel(rel_row_ptr, head, 0, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_R, REL_PER_HEAD)
        )  # (BLOCK_R, BLOCK_D)
        rel_colT = tl.trans(
            _load_rel(
                rel_col_ptr, head, HEAD_DIM // 2, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_R, REL_PER_HEAD
            )
        )  # (BLOCK_R, BLOCK_D)
        # Clamped, as tl.gather reads for pairs out of the window, too.
        col_offset = tl.minimum(tl.maximum(col_offset, 0), WINDOW - 1)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC_DTYPE)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC_DTYPE)
    for halo_row in range(0, TILE_H + WINDOW - 1):
        row_m = top + (halo_row - RADIUS) * dilation
        row_in_map = _row_in_map(row_m, height)
        mask = mask_md & row_in_map
        q = _load_row(q_ptrs, row_m, mask, stride_qh, UNIT, OFFSET_DTYPE)  # (BLOCK_M, BLOCK_D)
        do = _load_row(do_ptrs, row_m, mask, stride_doh, UNIT, OFFSET_DTYPE)  # (BLOCK_M, BLOCK_D)
        row_start = row_m.to(OFFSET_DTYPE) * width
        mask_m = col_in_map_m & row_in_map
        # P of queries out of the map comes out as zero.
        lse = tl.load(lse_ptrs + row_start, mask=mask_m, other=float('inf'))  # (BLOCK_M,)
        delta = tl.load(delta_ptrs + row_start, mask=mask_m, other=0.0)  # (BLOCK_M,)

        row_offset = offs_n // TILE_W - halo_row + 2 * RADIUS  # (BLOCK_N,)
        in_window = col_in_window & ((row_offset >= 0) & (row_offset < WINDOW))[:, None]
        sT = tl.zeros((BLOCK_N, BLOCK_M), ACC_DTYPE)  # not yet times QK_SCALE
        if HAS_REL:
            qr_rowT = _dot(rel_rowT, tl.trans(q), None, INPUT_PRECISION)  # (BLOCK_R, BLOCK_M)
            qr_colT = _dot(rel_colT, tl.trans(q), None, INPUT_PRECISION)  # (BLOCK_R, BLOCK_M)
            row_offset = tl.minimum(tl.maximum(row_offset, 0), WINDOW - 1)
            row_offset = tl.broadcast_to(row_offset[:, None], (BLOCK_N, BLOCK_M))
            sT += tl.gather(qr_rowT, row_offset, 0) + tl.gather(qr_colT, col_offset, 0)
        if HAS_K:
            sT += _dot(k, tl.trans(q), None, INPUT_PRECISION)
        sT = tl.where(in_window, sT * QK_SCALE, float('-inf'))
        pT = tl.exp2(sT - lse[None, :])  # (BLOCK_N, BLOCK_M)
        dv = _dot(pT.to(do.dtype), do, dv, INPUT_PRECISION)
        if HAS_K:
            dpT = _dot(v, tl.trans(do), None, INPUT_PRECISION)  # (BLOCK_N, BLOCK_M)
            dsT = pT * (dpT - delta[None, :])  # (BLOCK_N, BLOCK_M)
            dk = _dot(dsT.to(q.dtype), q, dk, INPUT_PRECISION)

    _store(
        _head_ptr(dv_ptr, image, head, stride_dvb, stride_dvc, HEAD_DIM, UNIT), dv,
        rows_n, cols_n, mask_n, stride_dvc, stride_dvh, stride_dvw,
        HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
    )  # fmt: skip
    if HAS_K:
        _store(
            _head_ptr(dk_ptr, image, head, stride_dkb, stride_dkc, HEAD_DIM, UNIT),
            dk * SCALE, rows_n, cols_n, mask_n, stride_dkc, stride_dkh, stride_dkw,
            HEAD_DIM, BLOCK_D, UNIT, OFFSET_DTYPE,
        )  # fmt: skip
