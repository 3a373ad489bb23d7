"""Local attention in C++ for the CPU; ``csrc/README.md`` says how the kernels in ``csrc/`` work."""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from ..native_library import load
from ..window import Window

_native, _why_missing = load()
# The largest stride that the kernels compute without the pixels between.
LARGEST_STRIDE = 1 if _native is None else _native.LARGEST_STRIDE


def missing() -> Optional[str]:
    """Say why the native kernels are missing; None if they are available."""
    return _why_missing


def refuse(query: Tensor, window: Window) -> Optional[str]:
    """Say why these kernels cannot compute an input; None if they can."""
    if query.device.type != 'cpu':
        return f'it computes on the CPU, but query is on {query.device}'
    largest = _native.LARGEST_KERNEL
    if window.kernel_size > largest:
        return f'it takes kernel_size up to {largest}, but it is {window.kernel_size}'
    return None


def forward(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
) -> Tuple[Tensor, Tensor]:
    """Compute the attention; arguments and results as in :func:`sasa_det.ops.backends.eager.forward`.

    Only the log-sum-exp differs: it is in units of log 2, as only :func:`backward` reads it.
    """
    return torch.ops.sasa_det_native.forward(query, key, value, rel_row, rel_col, *window)


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
    """Compute the gradients; arguments and results as in :func:`sasa_det.ops.backends.eager.backward`."""
    inputs = (query, key, value, rel_row, rel_col)
    return torch.ops.sasa_det_native.backward(grad, *inputs, logsumexp, *grad_maps, *window)


def take_over(logs_choices: Callable[[], bool]) -> None:
    """Have torch call these kernels, if available, for CPU tensors without going through Python.

    For a small map the way through Python takes almost as long as the kernel. They call the op in Python, as
    torch_library.py registers it, for what they cannot compute.

    Args:
        logs_choices: Says whether 'auto' must go through Python, which logs the chosen backend.
    """
    if _native is not None:
        _native.take_over(logs_choices)
