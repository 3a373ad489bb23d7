"""Local attention in Triton, for CUDA GPUs: what it takes, its forward and its backward.

``triton_launches.py`` lays out the launches, ``triton_kernels.py`` holds the kernels and says how they work.
Triton is imported when a kernel is first wanted, not with this module.
"""

import os
from functools import cache
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..window import Window, empty_logsumexp, empty_output
from .triton_launches import (
    backward_launches,
    empty_rel_partials,
    forward_launch,
    load_kernels,
    sum_rel_partials,
)

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
        load_kernels()
    except Exception as error:  # a broken installation fails in many ways
        return f'Triton does not import ({type(error).__name__}: {error})'
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

    But for the log-sum-exp, which is to base 2, see ``triton_kernels.py``: only :func:`backward` reads it.
    """
    output = empty_output(query)
    logsumexp = empty_logsumexp(query, window.num_heads)
    if query.numel():
        forward_launch(query, key, value, rel_row, rel_col, output, logsumexp, window).run()
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
    """Compute the gradients; arguments and results as in :func:`sasa_det.ops.backends.eager.backward`."""
    partials = None
    if rel_row is not None:
        partials = empty_rel_partials(query, rel_row, window, logsumexp.dtype)
    if query.numel():
        inputs = (grad, query, key, value, rel_row, rel_col, logsumexp)
        for launch in backward_launches(*inputs, *grad_maps, partials, window):
            launch.run()
    return (None, None) if partials is None else sum_rel_partials(partials, rel_row)
