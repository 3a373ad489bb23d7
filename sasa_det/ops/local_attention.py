"""How does every pixel attend to its window? The operator of this package, with its checks."""

import math
from numbers import Integral, Real
from typing import Optional

import torch
from torch import Tensor

from .backends.choice import BACKENDS
from .backends.reference import local_attention_reference
from .torch_library import ATTEND
from .window import BORDERS, Window

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def local_attention(
    query: Tensor,
    key: Optional[Tensor],
    value: Tensor,
    rel_row: Optional[Tensor] = None,
    rel_col: Optional[Tensor] = None,
    *,
    kernel_size: int,
    num_heads: int,
    dilation: int = 1,
    border: str = 'zeros',
    scale: float = 1.0,
    backend: str = 'auto',
) -> Tensor:
    r"""Let every pixel attend to the ``k x k`` window around it.

    .. math:: y_{ij} = \sum_{ab \in N_k(i,j)}
        \mathrm{softmax}_{ab}\big(s\,(q_{ij} k_{ab} + q_{ij} r_{a-i,b-j})\big)\, v_{ab}

    per head, as in equation 3 of `Stand-Alone Self-Attention in Vision Models
    <https://arxiv.org/abs/1906.05909>`_. The backward pass needs the inputs and one number per head
    and pixel. It is differentiable once, with ``backend='reference'`` any number of times.

    Args:
        query: (B, C, H, W) in float64, float32, bfloat16 or float16; any strides, any H and W,
            B = 0 as well. ``C = num_heads * d``.
        key: As query. None, with relative positions, for the logits q.r alone.
        value: As query.
        rel_row: (num_heads or 1, d/2, k), for the first half of each head's channels. Index t of
            the last axis holds the vector of the row offset ``(t - k // 2) * dilation`` from query
            to key. If the first dimension is 1, all heads share the table.
        rel_col: The same for columns and the second half of the channels. Give both tables or neither.
        kernel_size: Window size k in pixels, odd.
        num_heads: Number of heads that the channels are split into.
        dilation: Distance in pixels between neighbours in a window.
        border: 'zeros' or 'mask'. With 'zeros', keys and values outside of the map are zero
            vectors, and take part in the softmax with the logit q.r. With 'mask' they take no part.
        scale: Factor s of the logits. The paper has none.
        backend: 'auto' takes the fastest backend that supports the input. 'reference', 'eager',
            'native' and 'triton' take that backend or raise.

    Returns:
        (B, C, H, W), channels_last if query is, else contiguous. Logits may be of any finite size.
        A NaN or an infinity makes all that depends on it non-finite, and never reaches another
        image. But eager and triton compute whole tiles, so more of the same image may become
        non-finite.

    Raises:
        ValueError: An argument is not as above.
        TypeError: The tensors' types differ, outside autocast.
        RuntimeError: The backend asked for cannot compute this; lists every reason.

    Examples:
        >>> import torch
        >>> query, key, value = torch.randn(3, 2, 16, 20, 30).unbind()
        >>> rel_row, rel_col = torch.randn(2, 1, 2, 7).unbind()
        >>> local_attention(query, key, value, rel_row, rel_col, kernel_size=7, num_heads=4).shape
        torch.Size([2, 16, 20, 30])
    """
    check_window(kernel_size, num_heads, dilation, border, scale, backend)
    _check_tensors(query, key, value, rel_row, rel_col, kernel_size, num_heads)
    window = Window(int(kernel_size), int(num_heads), int(dilation), border, float(scale))
    if backend == 'reference':
        return local_attention_reference(query, key, value, rel_row, rel_col, window)
    return ATTEND(query, key, value, rel_row, rel_col, *window, backend)[0]


def check_window(
    kernel_size: int,
    num_heads: int,
    dilation: int = 1,
    border: str = 'zeros',
    scale: float = 1.0,
    backend: str = 'auto',
) -> None:
    """Raise a ValueError that names the first option that :func:`local_attention` would refuse.

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
    for name, number in (('num_heads', num_heads), ('dilation', dilation)):
        if not _is_int(number) or number < 1:
            raise ValueError(f'{name} must be an integer of at least 1, but is {number!r}')
    if border not in BORDERS:
        raise ValueError(f'border must be one of {BORDERS}, but is {border!r}')
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f'scale must be a finite number, but is {scale!r}')
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {BACKENDS}, but is {backend!r}')


def _is_int(x) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _check_tensors(query, key, value, rel_row, rel_col, kernel_size, num_heads) -> None:
    _check_dense('query', query)
    _check_dense('value', value)
    for name, x in (('key', key), ('rel_row', rel_row), ('rel_col', rel_col)):
        if x is not None:
            _check_dense(name, x)
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
        if x is not None and x.shape != query.shape:
            raise ValueError(
                f'{name} must be of the shape of query, {tuple(query.shape)}, but is {tuple(x.shape)}'
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


def _check_dense(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f'{name} must be a tensor, but is a {type(x).__name__}')
    if x.layout != torch.strided:
        raise ValueError(f'{name} must be a dense tensor, but its layout is {x.layout}')
