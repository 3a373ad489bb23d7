"""Local attention in CUDA C++, for NVIDIA GPUs, bfloat16 and float16: what it takes, its forward and backward.

``csrc/cuda/README.md`` says how the kernels work, and ``cuda_driver.py`` compiles and loads them. The C++
library launches them (``csrc/gpu.cpp``); where there is none, ``cuda_launches.py`` lays out the same launches.
Whatever these kernels do not take stays with Triton.
"""

import logging
import sys
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..window import Window, empty_logsumexp, empty_output
from . import cuda_driver, eager, triton
from .cuda_launches import (
    DEPTHS,
    DTYPES,
    KERNELS,
    WINDOWS,
    Variant,
    empty_partials,
    fits,
    laid_out,
    launch,
    room_for,
    shared_bytes,
    sum_partials,
    variant_of,
)

logger = logging.getLogger('sasa_det')
_THIS = sys.modules[__name__]


def missing() -> Optional[str]:
    """Say why there are no CUDA kernels here; None if there are."""
    return cuda_driver.missing()


def refuse(query: Tensor, window: Window) -> Optional[str]:
    """Say why these kernels cannot compute an input; None if they can."""
    if query.device.type != 'cuda':
        return f'it computes on CUDA devices, but query is on {query.device}'
    if query.dtype not in DTYPES:
        return f'it takes bfloat16 and float16, but query is {query.dtype}'
    if window.kernel_size not in WINDOWS:
        return f'it takes kernel_size of {WINDOWS}, but it is {window.kernel_size}'
    depth = query.shape[1] // window.num_heads
    if depth not in DEPTHS:
        return f'it takes {DEPTHS} channels a head, but there are {depth}'
    if window.scale <= 0:
        return f'it takes a positive scale, but it is {window.scale}'
    if not fits(query):
        return (
            'it takes maps in channels_last that begin at a multiple of 16 bytes, but query is '
            f'{tuple(query.shape)} with strides {query.stride()}'
        )
    # Key and tables are not known here: both take more memory.
    needed = max(
        shared_bytes(kernel, variant_of(query, query, query, window)) for kernel in KERNELS
    )
    limit = cuda_driver.shared_limit(query.device)
    if needed > limit:
        return (
            f'a block takes {needed} bytes of shared memory for {depth} channels a head and kernel_size '
            f'{window.kernel_size}, and {query.device} has {limit}'
        )
    return None


_outcomes: Dict[tuple, Optional[str]] = {}


def distrust(query: Tensor, window: Window, has_key: bool, has_rel: bool) -> Optional[str]:
    """Say why 'auto' must not take these kernels for an input; None if they agreed with another backend.

    They are compared on a small map, with Triton's or else with plain PyTorch, the first time that a process
    needs a variant on a GPU. The outcome is logged at DEBUG; a failure is warned of, once.

    Args:
        query: (B, C, H, W).
        window: The attention's options.
        has_key: Whether there are keys.
        has_rel: Whether there are relative positions.
    """
    variant = variant_of(query, query if has_key else None, query if has_rel else None, window)
    key = (query.device, variant)
    if key not in _outcomes:
        if torch.cuda.is_current_stream_capturing():
            return 'it was not compared with another backend before the capture of this CUDA graph'
        reason = _outcomes[key] = _disagreement(query.device, variant)
        where = f'{variant} on {query.device}'
        if reason is None:
            cuda_driver.trust(query.device, variant)
            logger.debug('the CUDA kernels agree with another backend for %s', where)
        else:
            logger.warning('the CUDA kernels are not used for %s: %s', where, reason)
    return _outcomes[key]


def distrust_layer(device='cuda') -> Optional[str]:
    """Say why 'auto' would not take these kernels for the paper's layer in bfloat16; None if they agreed.

    Args:
        device: Where to compare.
    """
    channels, heads, kernel_size = 256, 8, 7
    query = torch.zeros(1, channels, 1, 1, dtype=torch.bfloat16, device=device)
    window = Window(kernel_size, heads)
    return distrust(query, window, has_key=True, has_rel=True)


def _disagreement(device: torch.device, variant: Variant) -> Optional[str]:
    """Compare with another backend on a small map; None if all results agree."""
    heads, height, width = 2, 13, 21
    dilation, border = 2 if variant.dilated else 1, 'mask' if variant.masked else 'zeros'
    window = Window(variant.window, heads, dilation, border, variant.depth**-0.5)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, variant.dtype)

    shape = (1, heads * variant.depth, height, width)
    grad, query, key, value = (
        draw(*shape).contiguous(memory_format=torch.channels_last) for _ in range(4)
    )
    tables = [
        draw(1, variant.depth // 2, variant.window) if variant.has_rel else None for _ in range(2)
    ]
    inputs = (query, key if variant.has_key else None, value, *tables)
    peer = triton if triton.missing() is None and triton.refuse(query, window) is None else eager
    try:
        computed, expected = (_results(backend, grad, inputs, window) for backend in (_THIS, peer))
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of the compiler or the driver
        return str(error)
    name = peer.__name__.rpartition('.')[2]
    for what, x in computed.items():
        y = expected[what].float()
        difference = (x.float() - y).square().mean().sqrt().item()
        # Ten times what rounding to the type of the results makes of it.
        allowed = 4 * torch.finfo(variant.dtype).eps * y.square().mean().sqrt().item()
        if not difference <= allowed:
            return f'{what} differs from that of {name} by {difference:.2g}, and {allowed:.2g} is allowed'
    return None


def _results(backend, grad: Tensor, inputs: tuple, window: Window) -> Dict[str, Tensor]:
    output, logsumexp = backend.forward(*inputs, window)
    grad_maps = tuple(None if x is None else empty_output(x) for x in inputs[:3])
    grad_tables = backend.backward(grad, *inputs, logsumexp, grad_maps, window)
    names = ('output', 'grad_query', 'grad_key', 'grad_value', 'grad_rel_row', 'grad_rel_col')
    results = zip(names, (output, *grad_maps, *grad_tables))
    return {name: x for name, x in results if x is not None}


def forward(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor],
    rel_col: Optional[Tensor],
    window: Window,
) -> Tuple[Tensor, Tensor]:
    """Compute the attention; arguments and results as in :func:`sasa_det.ops.backends.eager.forward`.

    But for the log-sum-exp, which is to base 2: only :func:`backward` reads it.
    """
    if query.numel() and cuda_driver.connected():
        cuda_driver.load(query.device, 'forward', variant_of(query, key, rel_row, window))
        return torch.ops.sasa_det_cuda.forward(query, key, value, rel_row, rel_col, *window[:5])
    output = empty_output(query)
    logsumexp = empty_logsumexp(query, window.num_heads)
    if query.numel():
        (to,) = room_for(output)
        maps = dict(_inputs(query, key, value), output=to)
        tables, sums = _tables(rel_row, rel_col), dict(lse=logsumexp)
        cuda_driver.run(launch('forward', maps, sums, tables, window, ('output', 'lse')))
        _copy_back((output,), (to,))
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
    if query.numel() and cuda_driver.connected():
        for kernel in ('backward_queries', 'backward_keys'):
            cuda_driver.load(query.device, kernel, variant_of(query, key, rel_row, window))
        inputs = (query, key, value, rel_row, rel_col)
        return torch.ops.sasa_det_cuda.backward(grad, *inputs, logsumexp, *grad_maps, *window[:5])
    partials = None if rel_row is None else empty_partials(query, rel_row, window)
    if query.numel():
        maps = dict(_inputs(query, key, value), grad=laid_out(grad)[0])
        tables = _tables(rel_row, rel_col)
        sums = dict(lse=logsumexp, delta=torch.empty_like(logsumexp))
        grad_query, grad_key, grad_value = grad_maps
        (to_query,) = room_for(grad_query)
        cuda_driver.run(
            launch(
                'backward_queries',
                dict(maps, grad_query=to_query),
                dict(sums, partials=partials),
                tables,
                window,
                ('grad_query', 'delta', 'partials'),
            )  # fmt: skip
        )
        *to_key, to_value = room_for(*_present(grad_key, grad_value))
        to = dict(grad_key=to_key[0] if to_key else None, grad_value=to_value)
        cuda_driver.run(
            launch(
                'backward_keys', dict(maps, **to), sums, tables, window, ('grad_key', 'grad_value')
            )
        )
        _copy_back(grad_maps, (to_query, to['grad_key'], to_value))
    return (None, None) if partials is None else sum_partials(partials, rel_row)


def _inputs(query: Tensor, key: Optional[Tensor], value: Tensor) -> dict:
    """Lay out the maps that are read."""
    *keys, values = laid_out(*_present(key, value))
    return dict(query=laid_out(query)[0], key=keys[0] if keys else None, value=values)


def _copy_back(results: tuple, computed: tuple) -> None:
    """Copy what was computed elsewhere, as the kernels cannot write it where it belongs."""
    for result, x in zip(results, computed):
        if x is not result:
            result.copy_(x)


def _present(*maps: Optional[Tensor]) -> List[Tensor]:
    return [x for x in maps if x is not None]


def _tables(*tables: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    return tuple(None if x is None else x.contiguous() for x in tables)
