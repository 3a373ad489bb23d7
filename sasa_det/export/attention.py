"""How local attention is written in standard ONNX operators.

The graph loops over the window's offsets. A slice of the padded keys, times the queries, summed over
each head's channels, gives one logit per pixel and head. Each row of the window joins the softmax of
the rows before it, by a running maximum and sum. So memory holds one slice of keys or values and
``k`` logits per pixel and head, never ``k * k`` of either.
"""

from functools import reduce
from typing import Iterable, Optional

import numpy as np
from onnxscript import FLOAT
from onnxscript import opset18 as op

# The bias of a masked position; adding logits to it does not overflow.
CLOSED = float(np.finfo(np.float32).min / 2)
TO_THE_END = np.iinfo(np.int64).max


def local_attention(
    query: FLOAT,
    key: Optional[FLOAT],
    value: FLOAT,
    rel_row: Optional[FLOAT],
    rel_col: Optional[FLOAT],
    kernel_size: int,
    num_heads: int,
    dilation: int,
    border: str,
    scale: float,
    backend: str,
    stride: int = 1,
):
    """Write the operator ``sasa_det::local_attention`` as ONNX nodes.

    The nodes hold no map size as a constant, so images and batches may be of any size.

    Args:
        query: A value in the graph, (B, C, H, W) in float32; of a stride's pixels.
        key: (B, C, H, W), or None.
        value: As key.
        rel_row: (num_heads or 1, d/2, k), or None.
        rel_col: As rel_row.
        kernel_size, num_heads, dilation, border, scale: See :func:`sasa_det.ops.local_attention`.
        backend: Unused.
        stride: See :func:`sasa_det.ops.local_attention`.

    Returns:
        The output, of the shape of query, and the logsumexp, as the operator returns them.
    """
    reach = dilation * (kernel_size // 2)
    by_head = _by_head(query, num_heads)
    q = op.Reshape(query, by_head)
    if scale != 1:
        q = op.Mul(q, _float(scale))
    if stride != 1:
        by_head = _by_head(value, num_heads)
    keys = None if key is None else _padded(op.Reshape(key, by_head), reach)
    values = _padded(op.Reshape(value, by_head), reach)
    by_row = by_col = closed = None
    if rel_row is not None:
        first, second = _split(q, 2)
        by_row = _split(_positions(first, rel_row), kernel_size)
        by_col = _positions(second, rel_col)
    if border == 'mask':
        size = op.Concat(_ints(1, 1, 1), op.Shape(value, start=2), axis=0)
        closed = _padded(op.Expand(_float(0.0), size), reach, CLOSED)

    offsets = [dilation * step for step in range(kernel_size)]
    peak = total = result = None
    for row, down in enumerate(offsets):
        terms = []
        if keys is not None:
            products = (op.Mul(q, _at(keys, down, right, reach, stride)) for right in offsets)
            terms.append(_row(op.ReduceSum(product, _ints(2), keepdims=1) for product in products))
        if by_row is not None:
            terms.append(op.Add(by_col, by_row[row]))
        if closed is not None:
            terms.append(_row(_at(closed, down, right, reach, stride) for right in offsets))
        logits = reduce(op.Add, terms)
        highest = op.ReduceMax(logits, _ints(2), keepdims=1)
        before, peak = peak, highest if peak is None else op.Max(peak, highest)
        weights = op.Exp(op.Sub(logits, peak))
        mass = op.ReduceSum(weights, _ints(2), keepdims=1)
        seen = [
            op.Mul(column, _at(values, down, right, reach, stride))
            for column, right in zip(_split(weights, kernel_size), offsets)
        ]
        if before is None:
            total = mass
        else:
            fade = op.Exp(op.Sub(before, peak))
            total = op.Add(op.Mul(total, fade), mass)
            seen.insert(0, op.Mul(result, fade))
        result = reduce(op.Add, seen)
    output = op.Reshape(op.Div(result, total), op.Shape(query))
    logsumexp = op.Squeeze(op.Add(peak, op.Log(total)), _ints(2))
    return output, logsumexp


def _by_head(x, num_heads: int):
    """Write the shape of a map by heads: (B, num_heads, C / num_heads, H, W)."""
    ends = op.Shape(x, start=0, end=1), op.Shape(x, start=2)
    return op.Concat(ends[0], _ints(num_heads, -1), ends[1], axis=0)


def _ints(*numbers: int):
    return op.Constant(value_ints=list(numbers))


def _float(number: float):
    return op.Constant(value_float=number)


def _padded(x, reach: int, fill: float = 0.0):
    """Pad both ends of the last two of five axes."""
    return op.Pad(x, _ints(0, 0, 0, reach, reach, 0, 0, 0, reach, reach), _float(fill))


def _at(padded, down: int, right: int, reach: int, stride: int):
    """Slice the map, moved by an offset, out of its padding; its size follows from the slice's ends."""
    ends = [2 * reach - each for each in (down, right)]
    ends = [-each if each else TO_THE_END for each in ends]
    steps = [] if stride == 1 else [_ints(stride, stride)]
    return op.Slice(padded, _ints(down, right), _ints(*ends), _ints(3, 4), *steps)


def _split(x, parts: int) -> list:
    """Split along the third axis."""
    return list(op.Split(x, num_outputs=parts, axis=2)) if parts > 1 else [x]


def _row(maps: Iterable):
    maps = list(maps)
    return op.Concat(*maps, axis=2) if len(maps) > 1 else maps[0]


def _positions(query, table):
    """Multiply queries (B, heads, e, H, W) by a table (heads or 1, e, k): (B, heads, k, H, W)."""
    size = op.Shape(query, start=3)
    flat = op.Reshape(query, op.Concat(op.Shape(query, start=0, end=3), _ints(-1), axis=0))
    products = op.MatMul(op.Transpose(table, perm=[0, 2, 1]), flat)
    return op.Reshape(products, op.Concat(op.Shape(products, start=0, end=3), size, axis=0))
