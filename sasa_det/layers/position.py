"""Absolute positions; LocalSelfAttention2d itself holds the two tables of relative ones."""

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function


@wrap_torch_function(lambda like: (like,))  # torch.fx does not know the sizes
def sinusoidal_positions(like: Tensor) -> Tensor:
    """Compute the sinusoidal position of every pixel of a map (Vaswani et al., 2017, section 3.5).

    The first half of the channels encodes the row, the second the column. Each half holds sines,
    then cosines, of wavelengths from 2 pi to 10,000 * 2 pi pixels.

    Args:
        like: The map (B, C, H, W), C divisible by 4.

    Returns:
        (C, H, W), of the type and on the device of ``like``.

    Raises:
        ValueError: C is not divisible by 4.

    Examples:
        >>> positions = sinusoidal_positions(torch.zeros(1, 8, 5, 6))
        >>> bool((positions[:4, 2, 0] == positions[:4, 2, 5]).all())
        True
    """
    channels, height, width = like.shape[1:]
    check_sinusoidal_channels(channels)
    waves = torch.arange(channels // 4, device=like.device, dtype=torch.float32)
    waves = 10000 ** (-waves * 4 / channels)
    tables = []
    for length in (height, width):
        angles = waves[:, None] * torch.arange(length, device=like.device)
        tables.append(torch.cat((angles.sin(), angles.cos())))
    rows, cols = tables
    positions = torch.cat(
        (rows[:, :, None].expand(-1, -1, width), cols[:, None].expand(-1, height, -1))
    )
    return positions.to(like.dtype)


def check_sinusoidal_channels(channels: int) -> None:
    """Raise a ValueError if sine and cosine of row and column do not fill the channels evenly."""
    if channels % 4:
        raise ValueError(
            f"position='absolute' needs in_channels divisible by 4, but in_channels is {channels}"
        )
