"""Local attention in C++ for the CPU; the kernels are in ``csrc/``, and how they work in ``csrc/kernels.h``."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .geometry import Window, compute_dtype, empty_logsumexp, empty_output, sum_table_grads

try:
    from . import _native
except ImportError as error:
    _native = None
    _MISSING = str(error)

# LARGEST_SPAN in csrc/rows.h.
_LARGEST_KERNEL = 127


def missing() -> Optional[str]:
    """Say why there are no native kernels here; None if there are."""
    if _native is not None:
        return None
    return f'its C++ kernels are not built ({_MISSING}); `pip install -e .` builds them with g++'


def refuse(query: Tensor, window: Window) -> Optional[str]:
    """Say why these kernels cannot compute an input; None if they can."""
    if query.device.type != 'cpu':
        return f'it computes on the CPU, but query is on {query.device}'
    if window.kernel_size > _LARGEST_KERNEL:
        return f'it takes kernel_size up to {_LARGEST_KERNEL}, but it is {window.kernel_size}'
    return None


def forward(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
) -> Tuple[Tensor, Tensor]:
    """Compute the attention; arguments and results as in :func:`sasa_det.ops.eager.forward`.

    But for the log-sum-exp, which is in units of log 2 here: only :func:`backward` reads it.
    """
    output = empty_output(query)
    logsumexp = empty_logsumexp(query, window.num_heads)
    dtype = compute_dtype(query.dtype)
    row, col = _table(rel_row, dtype), _table(rel_col, dtype)
    _native.forward(query, key, value, row, col, output, logsumexp, *_options(query, window))
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
    """Compute the gradients; arguments and results as in :func:`sasa_det.ops.eager.backward`."""
    dtype = compute_dtype(query.dtype)
    row, col = _table(rel_row, dtype), _table(rel_col, dtype)
    tables = None
    if row is not None:
        # One partial sum for some rows of the map, so that threads share none and the order is fixed.
        blocks = -(-query.shape[2] // _native.TABLE_ROWS)
        tables = query.new_zeros(
            (
                query.shape[0],
                window.num_heads,
                window.dilation_in(*query.shape[2:]) ** 2 * blocks,
                2,
                *row.shape[1:],
            ),
            dtype=dtype,
        )
    _native.backward(
        grad, query, key, value, row, col, logsumexp,
        *grad_maps, tables, *_options(query, window),
    )  # fmt: skip
    return (None, None) if tables is None else sum_table_grads(tables, rel_row)


def _table(x: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    # A small map takes little longer than calls that change nothing.
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def _options(query: Tensor, window: Window) -> tuple:
    return (
        window.kernel_size,
        window.num_heads,
        window.dilation_in(*query.shape[2:]),
        window.border == 'mask',
        window.scale,
    )
