"""What defines a local attention window: the options of every backend, and each pixel's neighbourhood."""

from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .huge_pages import with_huge_pages

BORDERS = ('zeros', 'mask')


class Window(NamedTuple):
    """The options of one local attention, as :func:`sasa_det.ops.local_attention` documents them."""

    kernel_size: int
    num_heads: int
    dilation: int = 1
    border: str = 'zeros'
    scale: float = 1.0
    stride: int = 1

    @classmethod
    def of_op(cls, *options) -> 'Window':
        """Take the options of the op, in the order of its schema: the backend is between scale and stride."""
        return cls(*options[:5], *options[6:])

    @property
    def padding(self) -> int:
        """Pixels by which a window extends beyond the map at each border."""
        return self.dilation * (self.kernel_size // 2)

    def dilation_in(self, height: int, width: int) -> int:
        """Return the dilation, but at most a map's longer edge: all larger ones see only the centre."""
        return min(self.dilation, max(height, width))


def strided(x: Tensor, stride: int) -> Tensor:
    """View the queries' pixels of a map: every stride-th row and column, from the first on."""
    return x[:, :, ::stride, ::stride] if stride > 1 else x


def strided_copy(x: Tensor, stride: int) -> Tensor:
    """Copy the queries' pixels of a map, laid out by `output_format`; without a stride it is the map itself."""
    return strided(x, stride).contiguous(memory_format=output_format(x)) if stride > 1 else x


def strided_size(size: Tuple[int, ...], stride: int) -> Tuple[int, ...]:
    """Return the height and width that :func:`strided` leaves."""
    return tuple((n + stride - 1) // stride for n in size)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which softmax and sums are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_format(like: Tensor) -> torch.memory_format:
    """Return a result's memory format: channels_last if a pixel's channels are adjacent, else contiguous.

    A channel slice of a channels_last map counts as channels_last, though torch's is_contiguous
    denies it. A map of one pixel counts as contiguous: in torch 2.2 the backward of group_norm refuses
    another format.
    """
    # Their product would make numbers of sizes that an export leaves open.
    height, width = like.shape[2:]
    if like.is_contiguous() or like.stride(1) != 1 or (height == 1 and width == 1):
        return torch.contiguous_format
    return torch.channels_last


def empty_output(like: Tensor) -> Tensor:
    """Allocate a result of the shape, type and device of ``like``, laid out by `output_format`."""
    return with_huge_pages(torch.empty_like(like, memory_format=output_format(like)))


def empty_logsumexp(query: Tensor, num_heads: int) -> Tensor:
    """Allocate the log-sum-exp that a forward keeps: (B, num_heads, H, W) in the compute type."""
    batch, _, height, width = query.shape
    return query.new_empty((batch, num_heads, height, width), dtype=compute_dtype(query.dtype))


def unfold_windows(x: Tensor, window: Window) -> Tensor:
    """View the zero-padded neighbourhood of each query: (B, C, H, W) to (B, C, H, W, k, k), strided."""
    span = window.dilation * (window.kernel_size - 1) + 1
    x = F.pad(x, (window.padding,) * 4)
    x = x.unfold(2, span, window.stride).unfold(3, span, window.stride)
    return x[..., :: window.dilation, :: window.dilation]
