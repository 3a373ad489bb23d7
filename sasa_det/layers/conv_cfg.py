"""How ``conv_cfg`` builds the layer, in every part of mmdet that takes one."""

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
    """Build the layer of ``conv_cfg=dict(type='SASA', kernel_size=7, num_heads=8, ...)``.

    A host such as mmcv's ``ConvModule`` asks for a convolution and gets attention. Its 1x1
    convolutions, such as FPN's laterals, only mix channels and stay convolutions.

    Args:
        in_channels, out_channels: The host's.
        host_kernel_size: The host's kernel_size if passed by position, as ConvModule does.
        stride, dilation, bias: The host's; see :class:`LocalSelfAttention2d`.
        padding: The host's. Must keep the size of the map, as attention does.
        groups: The host's. Must be 1, unless keep_grouped.
        kernel_size: That of conv_cfg, which overrides the host's; or the host's, if passed by name,
            as ResNet does.
        attn_cfg: Arguments of :class:`LocalSelfAttention2d`, which override the host's. Needed for
            arguments that a host passes by name: ConvModule passes bias, ResNet kernel_size too.
        keep_grouped: Keep grouped convolutions, including depthwise ones, as convolutions.
        attention: Any other argument of :class:`LocalSelfAttention2d`.

    Raises:
        ValueError: See :class:`LocalSelfAttention2d`. Also if the host asks for a grouped
            convolution, or for a padding that changes the size of the map.

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
