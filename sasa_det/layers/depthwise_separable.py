"""Depthwise-separable convolution, by ``conv_cfg``: a cheap peer of attention in comparisons."""

from typing import Tuple, Union

from torch import nn
from torch.nn.modules.utils import _pair

Size = Union[int, Tuple[int, int]]


class DepthwiseSeparableConv2d(nn.Sequential):
    """Filter each channel over a window, then mix the channels at each pixel.

    Nothing is between the two convolutions, as in EfficientDet (https://arxiv.org/abs/1911.09070).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Window size in pixels, odd.
        stride: Distance in pixels between outputs.
        dilation: Distance in pixels between neighbours in a window.
        bias: Add a bias to the output.

    Shape:
        (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: kernel_size is even.

    Examples:
        >>> import torch
        >>> layer = DepthwiseSeparableConv2d(16, 32, kernel_size=5, stride=2)
        >>> layer(torch.zeros(1, 16, 9, 12)).shape
        torch.Size([1, 32, 5, 6])
    """

    # mmcv's ConvModule reads these from the layer that it wraps.
    groups = 1
    transposed = False
    output_padding = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 5,
        stride: Size = 1,
        dilation: Size = 1,
        bias: bool = False,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, but is {kernel_size}')
        padding = tuple(step * (kernel_size // 2) for step in _pair(dilation))
        depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, dilation, in_channels, bias=False
        )  # fmt: skip
        super().__init__(depthwise, nn.Conv2d(in_channels, out_channels, 1, bias=bias))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation


def build_depthwise_separable(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    window: int = 5,
) -> nn.Module:
    """Build the layer of ``conv_cfg=dict(type='DepthwiseSeparable', window=5)``.

    The host's 1x1 convolutions, such as FPN's laterals, only mix channels and stay as they are.

    Args:
        in_channels, out_channels, stride, dilation, bias: The host's.
        kernel_size: The host's; 1 for a convolution that stays.
        padding: The host's, for a convolution that stays. The others keep the size of the map.
        groups: The host's, which must be 1.
        window: Window size in pixels in the place of the host's kernel_size, odd.

    Raises:
        ValueError: window is even, or groups is not 1.

    Examples:
        >>> from mmcv.cnn import ConvModule
        >>> conv_cfg = dict(type='DepthwiseSeparable', window=5)
        >>> ConvModule(16, 32, 3, padding=1, conv_cfg=conv_cfg).conv.kernel_size
        5
    """
    if groups != 1:
        raise ValueError(f'groups must be 1 where conv_cfg is DepthwiseSeparable, but is {groups}')
    if tuple(_pair(kernel_size)) == (1, 1):
        return nn.Conv2d(in_channels, out_channels, 1, stride, padding, dilation, bias=bias)
    return DepthwiseSeparableConv2d(in_channels, out_channels, window, stride, dilation, bias)
