"""How ``attn_parts`` is read, and how its parts get attention."""

from typing import Optional, Sequence, Tuple, Union

from mmcv.cnn import ConvModule

from ..layers.attn_cfg import build_attention


def check_parts(
    attn_parts: Union[None, str, Sequence[str]], accepted: Tuple[str, ...], attn_cfg: Optional[dict]
) -> Tuple[str, ...]:
    """Read ``attn_parts`` into a tuple of the parts that attend.

    Args:
        attn_parts: Names among ``accepted``; None for all of them if there is an attn_cfg.
        accepted: The names of all parts.
        attn_cfg: None for convolution everywhere.

    Raises:
        ValueError: A part does not exist, or parts are named without an attn_cfg.

    Examples:
        >>> check_parts(None, ('cls', 'reg'), dict(kernel_size=7))
        ('cls', 'reg')
    """
    if attn_parts is None:
        return accepted if attn_cfg is not None else ()
    parts = (attn_parts,) if isinstance(attn_parts, str) else tuple(attn_parts)
    for part in parts:
        if part not in accepted:
            raise ValueError(f'attn_parts may hold {accepted}, but has {part!r}')
    if parts and attn_cfg is None:
        raise ValueError(
            f'attn_parts={parts} asks for attention, but attn_cfg is None; give it, such as '
            'attn_cfg=dict(kernel_size=7, num_heads=8), or leave attn_parts out'
        )
    return parts


def replace_conv(module: ConvModule, attn_cfg: dict) -> None:
    """Replace a ConvModule's convolution by attention; norm and activation stay."""
    conv = module.conv
    module.conv = build_attention(
        attn_cfg, conv.in_channels, conv.out_channels, conv.stride, conv.dilation
    )
