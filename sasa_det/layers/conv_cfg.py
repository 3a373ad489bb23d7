"""The layer as an entry of ``conv_cfg``, for every part of mmdet that has one."""

from typing import Optional, Tuple, Union

from torch import nn
from torch.nn.modules.utils import _pair

from .attn_cfg import check_attn_cfg
from .local_self_attention import LocalSelfAttention2d

Size = Union[int, Tuple[int, int]]


def build_sasa(
    in_channels: int,
    out_channels: int,
    host_kernel_size: Optional[Size] = None,
    /,
    stride: Size = 1,
    padding: Optional[Size] = None,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = False,
    kernel_size: Optional[Size] = None,
    attn_cfg: Optional[dict] = None,
    keep_grouped: bool = False,
    **attention,
) -> nn.Module:
    """Build what ``conv_cfg=dict(type='SASA', kernel_size=7, num_heads=8, ...)`` stands for.

    A host such as mmcv's ``ConvModule`` asks for a convolution and gets attention. Its 1x1
    convolutions (FPN's laterals, say), which only mix channels, stay convolutions.

    Args:
        in_channels, out_channels: As the host says.
        host_kernel_size: The host's kernel size where it passes it by position, as ConvModule does.
        stride, dilation, bias: As the host says; see :class:`LocalSelfAttention2d`.
        padding: The host's; must be the one that keeps the size of the map, as attention does.
        groups: The host's; must be 1, unless keep_grouped.
        kernel_size: From conv_cfg, and wins over the host's; or the host's, where it passes it by
            name, as ResNet does.
        attn_cfg: Arguments of :class:`LocalSelfAttention2d`, which win over the host's. The only way
            to give those that a host passes by name: ConvModule passes bias, ResNet kernel_size too.
        keep_grouped: Leave grouped convolutions, depthwise ones among them, to the host.
        attention: Any other argument of :class:`LocalSelfAttention2d`.

    Raises:
        ValueError: See :class:`LocalSelfAttention2d`; or the host asks for a grouped convolution, or
            for one that changes the size of the map by its padding.

    Examples:
        >>> from mmcv.cnn import ConvModule
        >>> conv_cfg = dict(type='SASA', kernel_size=7, num_heads=4)
        >>> ConvModule(16, 32, 3, padding=1, conv_cfg=conv_cfg).conv.kernel_size
        7
        >>> type(ConvModule(16, 32, 1, conv_cfg=conv_cfg).conv).__name__
        'Conv2d'
        >>> conv_cfg = dict(type='SASA', attn_cfg=dict(kernel_size=5, num_heads=4, bias=True))
        >>> norm_cfg = dict(type='BN')
        >>> ConvModule(16, 32, 3, padding=1, conv_cfg=conv_cfg, norm_cfg=norm_cfg).conv.kernel_size
        5
    """
    check_attn_cfg(attn_cfg)
    if host_kernel_size is None:
        host_kernel_size = kernel_size
    if _is_pointwise(host_kernel_size) or (groups != 1 and keep_grouped):
        padding = 0 if padding is None else padding
        return nn.Conv2d(
            in_channels, out_channels, host_kernel_size, stride, padding, dilation, groups, bias
        )
    if groups != 1:
        raise ValueError(
            f'groups must be 1 where conv_cfg is SASA, but is {groups}: attention mixes the channels '
            'of a head. keep_grouped=True in conv_cfg leaves grouped convolutions as they are'
        )
    if padding is not None and not _keeps_size(host_kernel_size, padding, dilation):
        raise ValueError(
            f'padding must keep the size of the map where conv_cfg is SASA, as attention does, but '
            f'is {padding} for a kernel of {host_kernel_size} with dilation {dilation}'
        )
    kernel_size = host_kernel_size if kernel_size is None else kernel_size
    given = {'kernel_size': kernel_size, 'bias': bias, **attention, **(attn_cfg or {})}
    return LocalSelfAttention2d(
        in_channels, out_channels, stride=stride, dilation=dilation, **given
    )


def _is_pointwise(kernel_size: Optional[Size]) -> bool:
    return kernel_size is not None and tuple(_pair(kernel_size)) == (1, 1)


def _keeps_size(kernel_size: Size, padding: Union[Size, str], dilation: Size) -> bool:
    if isinstance(padding, str):
        return padding == 'same'
    sizes = zip(_pair(kernel_size), _pair(padding), _pair(dilation))
    return all(2 * pad == step * (edge - 1) for edge, pad, step in sizes)
