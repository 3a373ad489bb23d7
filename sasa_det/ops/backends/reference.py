"""The definition of local attention, by unfolding every window: slow, memory-hungry, twice differentiable.

Tests compare with it and the attention maps are computed by it. Nothing else should call it on a
large map.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..window import Window, compute_dtype, output_format, unfold_windows


def window_logits(
    query: Tensor,
    key: Optional[Tensor],
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
    points: Optional[Tuple[Tensor, Tensor]] = None,
    size: Optional[Tuple[int, int]] = None,
) -> Tensor:
    """Compute ``scale * (q.k + q.r)`` of each query pixel against its window.

    Args:
        query: (B, C, H, W).
        key: (B, C, H, W), or None for the logits q.r alone. With a stride it is larger than query.
        rel_row: (num_heads or 1, d/2, k) or None.
        rel_col: As ``rel_row``, for the columns.
        window: The attention's options.
        points: Rows and columns, (P,) each, of the query pixels to compute; None for all pixels.
        size: Height and width of the keys' map; those of query by default.

    Returns:
        (B, num_heads, P, k, k), pixels in row-major order; -inf at positions that ``border='mask'``
        leaves out.
    """
    batch, channels, height, width = query.shape
    heads, edge = window.num_heads, window.kernel_size
    depth = channels // heads

    q = _split_heads(_at(query, points), heads)
    logits = q.new_zeros(batch, heads, q.shape[-1], edge, edge)
    if key is not None:
        k = _split_heads(_at(unfold_windows(key, window), points), heads)
        logits = logits + torch.einsum('bhdp,bhdpij->bhpij', q, k)
    if rel_row is not None:
        row = rel_row.expand(heads, -1, -1)
        col = rel_col.expand(heads, -1, -1)
        logits = logits + torch.einsum('bhdp,hdi->bhpi', q[:, :, : depth // 2], row)[..., None]
        logits = logits + torch.einsum('bhdp,hdj->bhpj', q[:, :, depth // 2 :], col)[..., None, :]
    logits = logits * window.scale
    if window.border == 'mask':
        inside = unfold_windows(query.new_ones(1, 1, *(size or (height, width))), window)
        logits = logits.masked_fill(_at(inside, points)[0, 0] == 0, float('-inf'))
    return logits


def attention_weights(*args, **kwargs) -> Tensor:
    """Compute the softmax of :func:`window_logits` over each window; takes the same arguments."""
    logits = window_logits(*args, **kwargs)
    return logits.flatten(3).softmax(-1).view_as(logits)


def local_attention_reference(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
) -> Tensor:
    """Compute local attention as written in section 3.1 of the paper (arXiv 1906.05909).

    Arguments are those of :func:`sasa_det.ops.local_attention`, already validated. The gradient is
    autograd's own. Memory holds ``k * k`` copies of key and value.
    """
    dtype = compute_dtype(query.dtype)
    q, k, v, row, col = (
        None if x is None else x.to(dtype) for x in (query, key, value, rel_row, rel_col)
    )
    weights = attention_weights(q, k, row, col, window, size=tuple(v.shape[2:]))
    values = _split_heads(_at(unfold_windows(v, window), None), window.num_heads)
    result = torch.einsum('bhpij,bhdpij->bhdp', weights, values).reshape(query.shape)
    return result.to(query.dtype).contiguous(memory_format=output_format(query))


def _at(x: Tensor, points: Optional[Tuple[Tensor, Tensor]]) -> Tensor:
    """Pick pixels out of a map: (B, C, H, W, ...) to (B, C, P, ...)."""
    return x.flatten(2, 3) if points is None else x[:, :, points[0], points[1]]


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(1, (num_heads, x.shape[1] // num_heads))
