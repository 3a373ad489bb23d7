"""Reading ``attn_cfg``, a dict of LocalSelfAttention2d's arguments."""

import inspect
from contextlib import contextmanager
from typing import Iterator, Optional, Sequence

from .local_self_attention import LocalSelfAttention2d

# Set by the part of the detector that attends, not by its config.
_HOST_ARGUMENTS = ('self', 'in_channels', 'out_channels', 'stride', 'dilation')
ARGUMENTS = tuple(
    name
    for name in inspect.signature(LocalSelfAttention2d.__init__).parameters
    if name not in _HOST_ARGUMENTS
)


def build_attention(
    attn_cfg: dict, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1
) -> LocalSelfAttention2d:
    """Build the attention that replaces a convolution.

    Args:
        attn_cfg: Arguments of :class:`~sasa_det.layers.LocalSelfAttention2d`, except for the four below.
        in_channels, out_channels, stride, dilation: Those of the convolution.

    Raises:
        ValueError: A key or a value is not accepted.

    Examples:
        >>> build_attention(dict(kernel_size=5, num_heads=4), 16, 32).kernel_size
        5
    """
    check_attn_cfg(attn_cfg)
    return LocalSelfAttention2d(
        in_channels, out_channels, stride=stride, dilation=dilation, **attn_cfg
    )


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Put the part of the detector before the message of a ValueError.

    One attn_cfg serves parts of different channels, so its message alone does not say which part refuses it.

    Args:
        part: Such as 'SASAResNet, stage 1'.

    Examples:
        >>> with naming('SASAResNet, stage 1'):
        ...     build_attention(dict(num_heads=3), 64, 64)
        Traceback (most recent call last):
            ...
        ValueError: SASAResNet, stage 1: num_heads must divide out_channels, 64, but is 3
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{part}: {error}') from error


def check_attn_cfg(attn_cfg: Optional[dict]) -> None:
    """Raise a ValueError if this is neither None nor a dict of LocalSelfAttention2d's arguments.

    Examples:
        >>> check_attn_cfg(dict(kernel=7))
        Traceback (most recent call last):
            ...
        ValueError: attn_cfg has the unknown key 'kernel'; it takes kernel_size, num_heads, ...
    """
    check_keys('attn_cfg', attn_cfg, ARGUMENTS)


def check_keys(name: str, cfg: Optional[dict], accepted: Sequence[str]) -> None:
    """Raise a ValueError if the argument ``name`` is neither None nor a dict of ``accepted`` keys."""
    if cfg is None:
        return
    if not isinstance(cfg, dict):
        raise ValueError(f'{name} must be a dict or None, but is {cfg!r}')
    for key in cfg:
        if key not in accepted:
            raise ValueError(f'{name} has the unknown key {key!r}; it takes {", ".join(accepted)}')
