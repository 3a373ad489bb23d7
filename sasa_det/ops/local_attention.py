"""How does every pixel attend to its window? The operator of this package."""

from typing import Optional

from torch import Tensor
from torch.overrides import wrap_torch_function

from .arguments import check_dense, check_tensors, check_window
from .backends.reference import local_attention_reference
from .torch_library import attend
from .window import Window


# torch.fx and other tensor-likes see one call, and not the checks, which read the values of their shapes.
@wrap_torch_function(lambda query, key, value, *_, **__: (query, key, value))
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
    stride: int = 1,
) -> Tensor:
    r"""Let every pixel attend to the ``k x k`` window around it.

    .. math:: y_{ij} = \sum_{ab \in N_k(i,j)}
        \mathrm{softmax}_{ab}\big(s\,(q_{ij} k_{ab} + q_{ij} r_{a-i,b-j})\big)\, v_{ab}

    per head, as in equation 3 of `Stand-Alone Self-Attention in Vision Models
    <https://arxiv.org/abs/1906.05909>`_. The backward pass keeps the inputs and one number
    per head and pixel. Gradients of gradients, forward-mode derivatives and ``torch.func`` work as well, at
    the cost of the reference, which holds ``k * k`` copies of key and value.

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
            'native', 'triton' and 'cuda' take that backend or raise.
        stride: Distance in pixels between queries, as of a strided convolution: query has the rows and columns
            0, stride, 2 * stride and so on, ceil(H / stride) and ceil(W / stride) of them, and key and value
            have all H x W pixels. Up to 8, the native kernels compute only what is asked for. Other backends
            attend at every pixel.

    Returns:
        As query: (B, C, H, W), channels_last if query is, else contiguous. Logits may be of any finite size.
        A NaN or an infinity makes all that depends on it non-finite, and never reaches another
        image. But eager, triton and cuda compute whole tiles, so more of the same image may
        become non-finite.

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
    inputs = (query, key, value, rel_row, rel_col)
    check_window(kernel_size, num_heads, dilation, border, scale, backend, stride)
    check_dense(*inputs)
    window = Window(
        int(kernel_size), int(num_heads), int(dilation), border, float(scale), int(stride)
    )
    if backend == 'reference':
        check_tensors(*inputs, window)
        return local_attention_reference(*inputs, window)
    # The op checks its tensors itself, as exported graphs call it without this function.
    return attend(*inputs, *window[:5], backend, window.stride)[0]
