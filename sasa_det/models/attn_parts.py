"""Reading ``attn_parts``, and putting attention into the parts that it names."""

from typing import Sequence, Tuple

from mmcv.cnn import ConvModule

from ..layers.attn_cfg import build_attention


def check_parts(attn_parts: Sequence[str], accepted: Tuple[str, ...]) -> Tuple[str, ...]:
    """Return ``attn_parts`` as a tuple, or raise a ValueError if one is not among ``accepted``."""
    parts = (attn_parts,) if isinstance(attn_parts, str) else tuple(attn_parts)
    for part in parts:
        if part not in accepted:
            raise ValueError(f'attn_parts may hold {accepted}, but has {part!r}')
    return parts


def replace_conv(module: ConvModule, attn_cfg: dict) -> None:
    """Put attention in the place of a ConvModule's convolution; norm and activation stay."""
    conv = module.conv
    module.conv = build_attention(
        attn_cfg, conv.in_channels, conv.out_channels, conv.stride, conv.dilation
    )
