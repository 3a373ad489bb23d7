"""The Triton kernels behind ``backend='triton'``; :mod:`sasa_det.ops.backends.triton` launches them.

A program computes one tile of ROWS x COLS queries of one head. It walks down the rows of the tile's halo
of keys: a row of SPAN keys against all queries of the tile is one product on the matrix units, in which
the pairs that lie outside of a query's window are closed by a logit of -inf. Of the logits' two relative
terms, the column's is the same for every row of keys, so that it is laid out once a tile; the row's
is one number a query and row of keys. Keys and values of the halo are read once a tile.

With a dilation of r the map falls into r * r interleaved ones that never meet; a tile lies in one of
them, and its pixels are r apart.

Shapes in comments: [queries, depth] and so on, where
    queries   TILE, the power of two that holds ROWS * COLS
    keys      SPAN, the power of two that holds COLS + WINDOW - 1
    offsets   OFFSETS, the power of two that holds WINDOW
    depth     PADDED, the power of two that holds DEPTH, the channels of a head
Logits are in units of log 2, for exp2, and so is the log-sum-exp.

Strides are in units of UNIT elements, that of the channels excepted: so the compiler knows that
vectors of channels_last maps are aligned without having to know the map's size. What changes with the
size of the image is not specialised on, so that no size compiles anew.
"""

import triton
import triton.language as tl

_VARYING = ['height', 'width', 'tiles', 'num_heads'] + [
    f'{tensor}_{axis}' for tensor in ('q', 'k', 'v', 'g', 'o', 'gq', 'gk', 'gv') for axis in 'bh'
]
_UNALIGNED = [
    f'{tensor}_{axis}' for tensor in ('q', 'k', 'v', 'g', 'o', 'gq', 'gk', 'gv') for axis in 'cw'
]
_jit = triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)

# Below every logit, and finite: the difference of two of them is a number.
_LOWEST = tl.constexpr(-1e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
# What tiles give to the gradients of relative positions is summed by so many first, see triton.py.
CHUNK = tl.constexpr(16)


@triton.jit
def _origin(tile, height, width, dilation, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Find the first pixel of a tile: its row and column."""
    across = tl.cdiv(tl.cdiv(width, dilation), COLS)
    down = tl.cdiv(tl.cdiv(height, dilation), ROWS)
    row, col = (tile // across) % down, tile % across
    phase = tile // (across * down)
    phases = tl.minimum(dilation, width)
    top = phase // phases + row * ROWS * dilation
    return top, phase % phases + col * COLS * dilation


_INTERPRETED = tl.constexpr(not isinstance(_origin, triton.JITFunction))


@triton.jit
def _plane(pointer, image, head, stride_b, stride_c, DEPTH: tl.constexpr, UNIT: tl.constexpr):
    """Point to the first channel of a head of an image."""
    return pointer + image.to(tl.int64) * stride_b * UNIT + head.to(tl.int64) * DEPTH * stride_c


@triton.jit
def _places(
    rows, cols, stride_c, stride_h, stride_w,
    PADDED: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Lay out the offsets of pixels' channels in a plane: [pixels] to [pixels, depth]."""
    pixels = rows.to(INDEX) * stride_h * UNIT + cols.to(INDEX) * stride_w * UNIT
    return pixels[:, None] + (tl.arange(0, PADDED).to(INDEX) * stride_c)[None, :]


@triton.jit
def _load(
    plane, rows, cols, inside, stride_c, stride_h, stride_w,
    DEPTH: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Load pixels' channels, zero where not inside: [pixels] to [pixels, depth]."""
    places = _places(rows, cols, stride_c, stride_h, stride_w, PADDED, UNIT, INDEX)
    there = inside[:, None] & (tl.arange(0, PADDED) < DEPTH)[None, :]
    return tl.load(plane + places, mask=there, other=0.0)


@triton.jit
def _store(
    plane, pixels, rows, cols, inside, stride_c, stride_h, stride_w,
    DEPTH: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Store pixels' channels [pixels, depth] where inside."""
    places = _places(rows, cols, stride_c, stride_h, stride_w, PADDED, UNIT, INDEX)
    there = inside[:, None] & (tl.arange(0, PADDED) < DEPTH)[None, :]
    tl.store(plane + places, pixels.to(plane.dtype.element_ty), mask=there)


@triton.jit
def _load_table(
    table, head, FIRST: tl.constexpr, WINDOW: tl.constexpr, DEPTH: tl.constexpr,
    PADDED: tl.constexpr, OFFSETS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Load a head's relative positions: [depth, offsets], zero in the half that they are not for."""
    HALF: tl.constexpr = DEPTH // 2
    c = tl.arange(0, PADDED) - FIRST
    t = tl.arange(0, OFFSETS)
    if PER_HEAD:
        table += head * HALF * WINDOW
    there = ((c >= 0) & (c < HALF))[:, None] & (t < WINDOW)[None, :]
    return tl.load(table + c[:, None] * WINDOW + t[None, :], mask=there, other=0.0)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """Multiply matrices and add them to a total, if any."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter would multiply the bits.
        a, b = a.to(tl.float32), b.to(tl.float32)
    SUM: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b, acc=total, input_precision=PRECISION, out_dtype=SUM)


@triton.jit
def _is_inside(row, height):
    """Say whether a row lies in the map, in a block of one.

    Not as a scalar: Triton 3.9's interpreter makes integers of a scalar condition. It compiles to the
    same registers.
    """
    row += tl.zeros((1,), tl.int32)
    return (row >= 0) & (row < height)


@triton.jit
def _row_of_logits(
    queries, keys, by_row, col_term, row_offset, row_inside,
    FACTOR: tl.constexpr, WINDOW: tl.constexpr, OFFSETS: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the logits of a tile's queries against a row of keys, -inf out of the windows.

    Args:
        queries: [queries, depth].
        keys: [keys, depth], or None.
        by_row: [queries, offsets], each query's relative terms of its window's rows, or None.
        col_term: [queries, keys], the columns' terms, -inf where the column is not in the window.
        row_offset: [queries], which of a query's rows this is, if any.
        row_inside: [1], whether the row lies in the map.
    """
    row_open = (row_offset >= 0) & (row_offset < WINDOW)
    if MASK:
        row_open &= row_inside
    if by_row is None:
        logits = tl.where(row_open[:, None], col_term, float('-inf'))
    else:
        chosen = tl.arange(0, OFFSETS)[None, :] == row_offset[:, None]
        row_term = tl.sum(tl.where(chosen, by_row, 0.0), 1)
        logits = col_term + tl.where(row_open, row_term, float('-inf'))[:, None]
    if keys is not None:
        logits += _dot(queries, tl.trans(keys), None, PRECISION) * FACTOR
    return logits


@triton.jit
def _spread(by_offset, offset, WINDOW: tl.constexpr, OFFSETS: tl.constexpr):
    """Lay out a term by offset over the keys: [queries, offsets] to [queries, keys].

    Rather than by tl.gather, which takes a hundred registers for it.
    """
    spread = offset.to(by_offset.dtype) * 0
    for t in range(0, WINDOW):
        own = tl.sum(tl.where((tl.arange(0, OFFSETS) == t)[None, :], by_offset, 0.0), 1)
        spread = tl.where(offset == t, own[:, None], spread)
    return spread


@triton.jit
def _collect(by_key, offset, WINDOW: tl.constexpr, OFFSETS: tl.constexpr):
    """Take what each offset has among the keys: [queries, keys] to [queries, offsets]."""
    collected = tl.zeros((by_key.shape[0], OFFSETS), by_key.dtype)
    for t in range(0, WINDOW):
        own = tl.sum(tl.where(offset == t, by_key, 0.0), 1)
        collected = tl.where((tl.arange(0, OFFSETS) == t)[None, :], own[:, None], collected)
    return collected


@_jit
def forward_kernel(
    q, k, v, rel_row, rel_col, o, logsumexp,
    q_b, q_c, q_h, q_w, k_b, k_c, k_h, k_w, v_b, v_c, v_h, v_w, o_b, o_c, o_h, o_w,
    height, width, num_heads, dilation, tiles,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, DEPTH: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY: tl.constexpr, HAS_POSITIONS: tl.constexpr, PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr,
    OFFSETS: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the output and the log-sum-exp of a tile of queries."""
    RADIUS: tl.constexpr = WINDOW // 2
    FACTOR: tl.constexpr = SCALE * _LOG2_E
    program = tl.program_id(0)
    head, image = (program // tiles) % num_heads, program // tiles // num_heads
    top, left = _origin(program % tiles, height, width, dilation, ROWS, COLS)

    n = tl.arange(0, TILE)
    rows, cols = top + n // COLS * dilation, left + n % COLS * dilation
    inside = (n < ROWS * COLS) & (rows < height) & (cols < width)
    queries = _load(
        _plane(q, image, head, q_b, q_c, DEPTH, UNIT),
        rows, cols, inside, q_c, q_h, q_w, DEPTH, PADDED, UNIT, INDEX,
    )  # fmt: skip

    m = tl.arange(0, SPAN)
    key_cols = left + (m - RADIUS) * dilation
    key_there = ((key_cols >= 0) & (key_cols < width))[:, None]
    col_offset = m[None, :] - (n % COLS)[:, None]  # [queries, keys]
    col_open = (col_offset >= 0) & (col_offset < WINDOW)
    if MASK:
        col_open &= ((key_cols >= 0) & (key_cols < width))[None, :]
    col_term = tl.zeros((TILE, SPAN), SUM)
    by_row = None
    if HAS_POSITIONS:
        table = _load_table(rel_row, head, 0, WINDOW, DEPTH, PADDED, OFFSETS, PER_HEAD)
        by_row = _dot(queries, table, None, PRECISION) * FACTOR  # [queries, offsets]
        table = _load_table(rel_col, head, DEPTH // 2, WINDOW, DEPTH, PADDED, OFFSETS, PER_HEAD)
        by_col = _dot(queries, table, None, PRECISION) * FACTOR
        col_term = _spread(by_col, col_offset, WINDOW, OFFSETS)
    col_term = tl.where(col_open, col_term, float('-inf'))

    c = tl.arange(0, PADDED)
    key_there = key_there & (c < DEPTH)[None, :]
    if HAS_KEY:
        k = _plane(k, image, head, k_b, k_c, DEPTH, UNIT)
        k += _places(m * 0, key_cols, k_c, k_h, k_w, PADDED, UNIT, INDEX)
    v = _plane(v, image, head, v_b, v_c, DEPTH, UNIT)
    v += _places(m * 0, key_cols, v_c, v_h, v_w, PADDED, UNIT, INDEX)
    peak = tl.full((TILE,), _LOWEST, SUM)
    total = tl.zeros((TILE,), SUM)
    output = tl.zeros((TILE, PADDED), SUM)
    for step in range(0, ROWS + WINDOW - 1):
        key_row = top + (step - RADIUS) * dilation
        row_inside = _is_inside(key_row, height)
        there = key_there & row_inside
        keys = None
        if HAS_KEY:
            keys = tl.load(k + key_row.to(INDEX) * k_h * UNIT, mask=there, other=0.0)
        logits = _row_of_logits(
            queries, keys, by_row, col_term, step - n // COLS, row_inside,
            FACTOR, WINDOW, OFFSETS, MASK, PRECISION,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        peak = new_peak
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + key_row.to(INDEX) * v_h * UNIT, mask=there, other=0.0)
        output = _dot(weights.to(values.dtype), values, output * shrink[:, None], PRECISION)

    # Queries that pad the tile may see no key at all.
    total = tl.where(inside, total, 1.0)
    _store(
        _plane(o, image, head, o_b, o_c, DEPTH, UNIT), output / total[:, None],
        rows, cols, inside, o_c, o_h, o_w, DEPTH, PADDED, UNIT, INDEX,
    )  # fmt: skip
    logsumexp += (image * num_heads + head).to(tl.int64) * height * width
    tl.store(logsumexp + rows.to(INDEX) * width + cols, peak + tl.log2(total), mask=inside)


@_jit
def backward_queries_kernel(
    g, q, k, v, rel_row, rel_col, logsumexp, gq, delta, partial,
    g_b, g_c, g_h, g_w, q_b, q_c, q_h, q_w, k_b, k_c, k_h, k_w, v_b, v_c, v_h, v_w,
    gq_b, gq_c, gq_h, gq_w,
    height, width, num_heads, dilation, tiles,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, DEPTH: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY: tl.constexpr, HAS_POSITIONS: tl.constexpr, PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr,
    OFFSETS: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of some tiles of queries, and their part of the relative positions'.

    The derivative of a logit is w (dw - delta) for a weight w whose derivative is dw, delta being the
    sum of w dw over the window. So the window is walked through twice, first for delta.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    FACTOR: tl.constexpr = SCALE * _LOG2_E
    program = tl.program_id(0)
    head, image = (program // tiles) % num_heads, program // tiles // num_heads
    plane = (image * num_heads + head).to(tl.int64) * height * width
    g = _plane(g, image, head, g_b, g_c, DEPTH, UNIT)
    q = _plane(q, image, head, q_b, q_c, DEPTH, UNIT)
    v = _plane(v, image, head, v_b, v_c, DEPTH, UNIT)
    gq = _plane(gq, image, head, gq_b, gq_c, DEPTH, UNIT)
    if HAS_KEY:
        k = _plane(k, image, head, k_b, k_c, DEPTH, UNIT)
    c = tl.arange(0, PADDED)
    t = tl.arange(0, OFFSETS)
    n = tl.arange(0, TILE)
    m = tl.arange(0, SPAN)
    if HAS_POSITIONS:
        row_table = _load_table(rel_row, head, 0, WINDOW, DEPTH, PADDED, OFFSETS, PER_HEAD)
        col_table = _load_table(rel_col, head, DEPTH // 2, WINDOW, DEPTH, PADDED, OFFSETS, PER_HEAD)

    top, left = _origin(program % tiles, height, width, dilation, ROWS, COLS)
    rows, cols = top + n // COLS * dilation, left + n % COLS * dilation
    inside = (n < ROWS * COLS) & (rows < height) & (cols < width)
    queries = _load(
        q, rows, cols, inside, q_c, q_h, q_w, DEPTH, PADDED, UNIT, INDEX
    )  # [queries, depth]
    grads = _load(g, rows, cols, inside, g_c, g_h, g_w, DEPTH, PADDED, UNIT, INDEX)
    place = plane + rows.to(INDEX) * width + cols
    # The weights of queries that pad the tile come out as zero.
    lse = tl.load(logsumexp + place, mask=inside, other=float('inf'))

    key_cols = left + (m - RADIUS) * dilation
    key_there = ((key_cols >= 0) & (key_cols < width))[:, None] & (c < DEPTH)[None, :]
    if HAS_KEY:
        k_at = k + _places(m * 0, key_cols, k_c, k_h, k_w, PADDED, UNIT, INDEX)
    v_at = v + _places(m * 0, key_cols, v_c, v_h, v_w, PADDED, UNIT, INDEX)
    col_offset = m[None, :] - (n % COLS)[:, None]  # [queries, keys]
    col_open = (col_offset >= 0) & (col_offset < WINDOW)
    if MASK:
        col_open &= ((key_cols >= 0) & (key_cols < width))[None, :]
    col_term = tl.zeros((TILE, SPAN), SUM)
    by_row = None
    if HAS_POSITIONS:
        by_row = _dot(queries, row_table, None, PRECISION) * FACTOR
        by_col = _dot(queries, col_table, None, PRECISION) * FACTOR
        col_term = _spread(by_col, col_offset, WINDOW, OFFSETS)
    col_term = tl.where(col_open, col_term, float('-inf'))
    own_delta = tl.zeros((TILE,), SUM)
    for step in range(0, ROWS + WINDOW - 1):
        key_row = top + (step - RADIUS) * dilation
        row_inside = _is_inside(key_row, height)
        there = key_there & row_inside
        keys = None
        if HAS_KEY:
            keys = tl.load(k_at + key_row.to(INDEX) * k_h * UNIT, mask=there, other=0.0)
        logits = _row_of_logits(
            queries, keys, by_row, col_term, step - n // COLS, row_inside,
            FACTOR, WINDOW, OFFSETS, MASK, PRECISION,
        )  # fmt: skip
        values = tl.load(v_at + key_row.to(INDEX) * v_h * UNIT, mask=there, other=0.0)
        grad_weights = _dot(grads, tl.trans(values), None, PRECISION)
        own_delta += tl.sum(tl.exp2(logits - lse[:, None]) * grad_weights, 1)
    tl.store(delta + place, own_delta, mask=inside)

    grad = tl.zeros((TILE, PADDED), SUM)
    if HAS_POSITIONS:
        grad_by_row = tl.zeros((TILE, OFFSETS), SUM)
        grad_by_key_col = tl.zeros((TILE, SPAN), SUM)
    for step in range(0, ROWS + WINDOW - 1):
        key_row = top + (step - RADIUS) * dilation
        row_inside = _is_inside(key_row, height)
        there = key_there & row_inside
        keys = None
        if HAS_KEY:
            keys = tl.load(k_at + key_row.to(INDEX) * k_h * UNIT, mask=there, other=0.0)
        logits = _row_of_logits(
            queries, keys, by_row, col_term, step - n // COLS, row_inside,
            FACTOR, WINDOW, OFFSETS, MASK, PRECISION,
        )  # fmt: skip
        values = tl.load(v_at + key_row.to(INDEX) * v_h * UNIT, mask=there, other=0.0)
        grad_weights = _dot(grads, tl.trans(values), None, PRECISION)
        grad_logits = tl.exp2(logits - lse[:, None]) * (grad_weights - own_delta[:, None])
        if HAS_KEY:
            grad = _dot(grad_logits.to(keys.dtype), keys, grad, PRECISION)
        if HAS_POSITIONS:
            grad_by_key_col += grad_logits
            chosen = t[None, :] == (step - n // COLS)[:, None]
            grad_by_row += tl.where(chosen, tl.sum(grad_logits, 1)[:, None], 0.0)

    if HAS_POSITIONS:
        grad_by_col = _collect(grad_by_key_col, col_offset, WINDOW, OFFSETS)
        by_row = grad_by_row.to(queries.dtype)
        by_col = grad_by_col.to(queries.dtype)
        grad = _dot(by_row, tl.trans(row_table), grad, PRECISION)
        grad = _dot(by_col, tl.trans(col_table), grad, PRECISION)
        # [offsets, depth], of whose rows there are fewer than 64: the other way round, where a head has 64
        # channels, Triton 3.6 takes Hopper's asynchronous products, and stores the first of the two at random.
        grad_row_table = _dot(tl.trans(by_row), queries, None, PRECISION)
        grad_col_table = _dot(tl.trans(by_col), queries, None, PRECISION)
    _store(gq, grad * SCALE, rows, cols, inside, gq_c, gq_h, gq_w, DEPTH, PADDED, UNIT, INDEX)

    if HAS_POSITIONS:
        # [rows or columns, half of the depth, window]
        HALF: tl.constexpr = DEPTH // 2
        own = program // tiles * (tl.cdiv(tiles, CHUNK) * CHUNK) + program % tiles
        partial += own.to(tl.int64) * 2 * HALF * WINDOW
        place = c[None, :] * WINDOW + t[:, None]
        there = (t < WINDOW)[:, None]
        tl.store(partial + place, grad_row_table * SCALE, mask=there & (c < HALF)[None, :])
        # Columns come second in the depth, as in the partial sum.
        second = ((c >= HALF) & (c < DEPTH))[None, :]
        tl.store(partial + place, grad_col_table * SCALE, mask=there & second)


@_jit
def backward_keys_kernel(
    g, q, k, v, rel_row, rel_col, logsumexp, delta, gk, gv,
    g_b, g_c, g_h, g_w, q_b, q_c, q_h, q_w, k_b, k_c, k_h, k_w, v_b, v_c, v_h, v_w,
    gk_b, gk_c, gk_h, gk_w, gv_b, gv_c, gv_h, gv_w,
    height, width, num_heads, dilation, tiles,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, DEPTH: tl.constexpr, MASK: tl.constexpr,
    HAS_KEY: tl.constexpr, HAS_POSITIONS: tl.constexpr, PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr,
    OFFSETS: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gather the gradients of a tile of keys and values from the queries that see them.

    The tile is one of keys here, and its halo one of queries: [keys] is TILE and [queries] SPAN.
    """
    RADIUS: tl.constexpr = WINDOW // 2
    FACTOR: tl.constexpr = SCALE * _LOG2_E
    program = tl.program_id(0)
    head, image = (program // tiles) % num_heads, program // tiles // num_heads
    top, left = _origin(program % tiles, height, width, dilation, ROWS, COLS)

    c = tl.arange(0, PADDED)
    n = tl.arange(0, TILE)
    rows, cols = top + n // COLS * dilation, left + n % COLS * dilation
    inside = (n < ROWS * COLS) & (rows < height) & (cols < width)
    values = _load(
        _plane(v, image, head, v_b, v_c, DEPTH, UNIT),
        rows,
        cols,
        inside,
        v_c,
        v_h,
        v_w,
        DEPTH,
        PADDED,
        UNIT,
        INDEX,
    )  # fmt: skip  [keys, depth]
    if HAS_KEY:
        keys = _load(
            _plane(k, image, head, k_b, k_c, DEPTH, UNIT),
            rows, cols, inside, k_c, k_h, k_w, DEPTH, PADDED, UNIT, INDEX,
        )  # fmt: skip

    m = tl.arange(0, SPAN)
    query_cols = left + (m - RADIUS) * dilation
    query_inside = (query_cols >= 0) & (query_cols < width)
    query_there = query_inside[:, None] & (c < DEPTH)[None, :]
    q = _plane(q, image, head, q_b, q_c, DEPTH, UNIT)
    q += _places(m * 0, query_cols, q_c, q_h, q_w, PADDED, UNIT, INDEX)
    g = _plane(g, image, head, g_b, g_c, DEPTH, UNIT)
    g += _places(m * 0, query_cols, g_c, g_h, g_w, PADDED, UNIT, INDEX)
    plane = (image * num_heads + head).to(tl.int64) * height * width
    logsumexp += plane + query_cols
    delta += plane + query_cols

    col_offset = (n % COLS)[:, None] - m[None, :] + 2 * RADIUS  # [keys, queries]
    col_open = (col_offset >= 0) & (col_offset < WINDOW)
    if HAS_POSITIONS:
        row_table = tl.trans(
            _load_table(rel_row, head, 0, WINDOW, DEPTH, PADDED, OFFSETS, PER_HEAD)
        )
        col_table = tl.trans(
            _load_table(rel_col, head, DEPTH // 2, WINDOW, DEPTH, PADDED, OFFSETS, PER_HEAD)
        )
        col_offset = tl.minimum(tl.maximum(col_offset, 0), WINDOW - 1)
    grad_keys = tl.zeros((TILE, PADDED), SUM)
    grad_values = tl.zeros((TILE, PADDED), SUM)
    for step in range(0, ROWS + WINDOW - 1):
        query_row = top + (step - RADIUS) * dilation
        row_inside = _is_inside(query_row, height)
        there = query_there & row_inside
        queries = tl.load(q + query_row.to(INDEX) * q_h * UNIT, mask=there, other=0.0)
        grads = tl.load(g + query_row.to(INDEX) * g_h * UNIT, mask=there, other=0.0)
        place = query_row.to(INDEX) * width
        there = query_inside & row_inside
        # The weights of queries out of the map come out as zero.
        lse = tl.load(logsumexp + place, mask=there, other=float('inf'))
        query_delta = tl.load(delta + place, mask=there, other=0.0)

        row_offset = n // COLS - step + 2 * RADIUS  # [keys]
        open = col_open & ((row_offset >= 0) & (row_offset < WINDOW))[:, None]
        logits = tl.zeros((TILE, SPAN), SUM)
        if HAS_POSITIONS:
            by_row = _dot(row_table, tl.trans(queries), None, PRECISION)
            by_col = _dot(col_table, tl.trans(queries), None, PRECISION)
            row_offset = tl.minimum(tl.maximum(row_offset, 0), WINDOW - 1)
            row_offset = tl.broadcast_to(row_offset[:, None], (TILE, SPAN))
            # [offsets, queries] to [keys, queries]
            logits += tl.gather(by_row, row_offset, 0) + tl.gather(by_col, col_offset, 0)
        if HAS_KEY:
            logits += _dot(keys, tl.trans(queries), None, PRECISION)
        weights = tl.exp2(tl.where(open, logits * FACTOR, float('-inf')) - lse[None, :])
        grad_values = _dot(weights.to(grads.dtype), grads, grad_values, PRECISION)
        if HAS_KEY:
            grad_weights = _dot(values, tl.trans(grads), None, PRECISION)
            grad_logits = weights * (grad_weights - query_delta[None, :])
            grad_keys = _dot(grad_logits.to(queries.dtype), queries, grad_keys, PRECISION)

    _store(
        _plane(gv, image, head, gv_b, gv_c, DEPTH, UNIT), grad_values,
        rows, cols, inside, gv_c, gv_h, gv_w, DEPTH, PADDED, UNIT, INDEX,
    )  # fmt: skip
    if HAS_KEY:
        _store(
            _plane(gk, image, head, gk_b, gk_c, DEPTH, UNIT), grad_keys * SCALE,
            rows, cols, inside, gk_c, gk_h, gk_w, DEPTH, PADDED, UNIT, INDEX,
        )  # fmt: skip
