"""What :func:`sasa_det.ops.local_attention` takes, and what it says of anything else."""

from numbers import Integral, Real

import torch
from torch import Tensor

from .backends.choice import BACKENDS
from .window import BORDERS, Window, strided_size

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_window(
    kernel_size: int,
    num_heads: int,
    dilation: int = 1,
    border: str = 'zeros',
    scale: float = 1.0,
    backend: str = 'auto',
    stride: int = 1,
) -> None:
    """Raise a ValueError that names the first option :func:`local_attention` would not take.

    Examples:
        >>> check_window(kernel_size=4, num_heads=8)
        Traceback (most recent call last):
            ...
        ValueError: kernel_size must be an odd integer of at least 1, but is 4
    """
    if not _is_int(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f'kernel_size must be an odd integer of at least 1, but is {kernel_size!r}'
        )
    for name, number in (('num_heads', num_heads), ('dilation', dilation), ('stride', stride)):
        if not _is_int(number) or number < 1:
            raise ValueError(f'{name} must be an integer of at least 1, but is {number!r}')
    if border not in BORDERS:
        raise ValueError(f'border must be one of {BORDERS}, but is {border!r}')
    # NaN for an infinity and NaN. Compilers that take scale as a symbol cannot follow math.isfinite.
    if isinstance(scale, bool) or not isinstance(scale, Real) or scale - scale != 0:
        raise ValueError(f'scale must be a finite number, but is {scale!r}')
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {BACKENDS}, but is {backend!r}')


def _is_int(x) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def check_dense(query, key, value, rel_row, rel_col) -> None:
    """Raise a ValueError that names the first input that is no dense tensor."""
    _check_dense('query', query)
    _check_dense('value', value)
    for name, x in (('key', key), ('rel_row', rel_row), ('rel_col', rel_col)):
        if x is not None:
            _check_dense(name, x)


def check_tensors(query, key, value, rel_row, rel_col, window: Window) -> None:
    """Raise a ValueError that names the first tensor whose shape, type or device does not fit the others."""
    kernel_size, num_heads = window.kernel_size, window.num_heads
    if query.dim() != 4 or query.dtype not in DTYPES:
        raise ValueError(
            f'query must be (B, C, H, W) in one of {DTYPES}, '
            f'but is {tuple(query.shape)} in {query.dtype}'
        )
    channels = query.shape[1]
    if channels == 0 or channels % num_heads:
        raise ValueError(
            f'num_heads must divide the channels of query, {channels}, but is {num_heads}'
        )
    if query.shape[2] == 0 or query.shape[3] == 0:
        raise ValueError(f'query must be at least one pixel large, but is {tuple(query.shape)}')
    for name, x in (('key', key), ('value', value)):
        if x is not None and not _fits(x, query, window.stride):
            raise ValueError(
                f'{name} must be of the shape of query, {tuple(query.shape)}, but is {tuple(x.shape)}'
                if window.stride == 1
                else f'query must have every pixel of {name} that a stride of {window.stride} leaves, '
                f'but they are {tuple(query.shape)} and {tuple(x.shape)}'
            )
    if key is not None and key.shape != value.shape:
        raise ValueError(
            f'key must be of the shape of value, {tuple(value.shape)}, but is {tuple(key.shape)}'
        )
    if (rel_row is None) != (rel_col is None):
        missing = 'rel_row' if rel_row is None else 'rel_col'
        raise ValueError(f'rel_row and rel_col come together, but {missing} is None')
    if rel_row is None:
        if key is None:
            raise ValueError('key may be None only where rel_row and rel_col are given')
    else:
        depth = channels // num_heads
        if depth % 2:
            raise ValueError(
                'relative positions need an even number of channels per head, '
                f'but {channels} channels in {num_heads} heads are {depth}'
            )
        for name, x in (('rel_row', rel_row), ('rel_col', rel_col)):
            if (
                x.dim() != 3
                or x.shape[0] not in (1, num_heads)
                or x.shape[1:] != (depth // 2, kernel_size)
            ):
                raise ValueError(
                    f'{name} must be ({num_heads} or 1, {depth // 2}, {kernel_size}) for {channels} '
                    f'channels, num_heads={num_heads} and kernel_size={kernel_size}, '
                    f'but is {tuple(x.shape)}'
                )
        if rel_row.shape != rel_col.shape:
            raise ValueError(
                'rel_row and rel_col must both be shared by the heads, or neither, '
                f'but are {tuple(rel_row.shape)} and {tuple(rel_col.shape)}'
            )
    for name, x in (('key', key), ('value', value), ('rel_row', rel_row), ('rel_col', rel_col)):
        if x is not None and x.device != query.device:
            raise ValueError(
                f'{name} must be on the device of query, {query.device}, but is on {x.device}'
            )


def _fits(x, query, stride: int) -> bool:
    if stride == 1 or x.dim() != 4:
        return x.shape == query.shape
    return x.shape[:2] == query.shape[:2] and strided_size(x.shape[2:], stride) == tuple(
        query.shape[2:]
    )


def _check_dense(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f'{name} must be a tensor, but is a {type(x).__name__}')
    if x.layout != torch.strided:
        raise ValueError(f'{name} must be a dense tensor, but its layout is {x.layout}')
