"""The layer as an entry of ``conv_cfg``, for every part of mmdet that has one."""

from typing import Optional

from mmengine.registry import MODELS
from torch import nn

from .local_self_attention import LocalSelfAttention2d


# In mmengine's registry, as mmcv's own convolutions, so that every project finds it.
@MODELS.register_module('SASA')
def build_sasa(
    in_channels: int,
    out_channels: int,
    host_kernel_size: Optional[int] = None,
    /,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    kernel_size: Optional[int] = None,
    **attention,
) -> nn.Module:
    """Build what ``conv_cfg=dict(type='SASA', kernel_size=7, num_heads=8, ...)`` stands for.

    A host such as mmcv's ``ConvModule`` asks for a convolution and gets attention. Its 1x1
    convolutions (FPN's laterals, say), which only mix channels, stay convolutions.

    Args:
        in_channels, out_channels: As the host says.
        host_kernel_size: The host's kernel size where it passes it by position, as ConvModule does.
        stride, dilation, bias: As the host says; see :class:`LocalSelfAttention2d`.
        padding: The host's; attention keeps the size of the map whatever it is.
        groups: The host's; must be 1.
        kernel_size: From conv_cfg, and wins over the host's; or the host's, where it passes it by
            name, as ResNet does. Python lets no conv_cfg repeat a name: use SASAResNet there.
        attention: Any other argument of :class:`LocalSelfAttention2d`.

    Raises:
        ValueError: See :class:`LocalSelfAttention2d`; or the host asks for a grouped convolution.

    Example:
        >>> from mmcv.cnn import ConvModule
        >>> conv_cfg = dict(type='SASA', kernel_size=7, num_heads=4)
        >>> ConvModule(16, 32, 3, padding=1, conv_cfg=conv_cfg).conv.kernel_size
        7
        >>> type(ConvModule(16, 32, 1, conv_cfg=conv_cfg).conv).__name__
        'Conv2d'
    """
    if host_kernel_size is None:
        host_kernel_size = kernel_size
    if host_kernel_size in (1, (1, 1), [1, 1]):
        return nn.Conv2d(in_channels, out_channels, 1, stride, padding, dilation, groups, bias=bias)
    if groups != 1:
        raise ValueError(f'groups must be 1 where conv_cfg is SASA, but is {groups}')
    kernel_size = host_kernel_size if kernel_size is None else kernel_size
    return LocalSelfAttention2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        dilation=dilation,
        bias=bias,
        **attention,
    )
