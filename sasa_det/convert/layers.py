"""Which convolutions can become attention, of which shape, and how fitted weights are written to it."""

from fnmatch import fnmatchcase
from typing import Dict, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from ..layers import LocalSelfAttention2d
from .fit import StaticAttention

# Below so many channels an image is read, and a head would see nothing.
FEWEST_CHANNELS = 8
# Channels of a head from which heads can point apart by tables that they share.
_SHARED_DEPTH = 8
# Classes that compute what nn.Conv2d does; mmcv's differs for empty inputs in old versions of torch.
_PLAIN = ('torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d')


class Choice(NamedTuple):
    """What becomes of a convolution.

    Attributes:
        attn_cfg: The arguments of its attention; None if it stays.
        reason: Why it stays.
    """

    attn_cfg: Optional[dict]
    reason: str = ''


def choose_layers(
    model: nn.Module,
    num_heads: int = 8,
    kernel_size: int = 5,
    layers: Sequence[str] = ('*',),
    static: bool = False,
    expansion: int = 1,
) -> Dict[str, Choice]:
    """Decide for each spatial convolution of a model whether it becomes attention.

    Args:
        model: The model.
        num_heads: Heads of each attention, at most; as many as divide its channels into even numbers.
        kernel_size: Window size of each attention, odd and at least 3.
        layers: Names of convolutions, or patterns such as ``backbone.*``.
        static: Give each attention the same weights at every pixel, so that it needs no queries and keys.
        expansion: Channels of each attention, as a multiple of the output's; in predictors, of the input's.

    Returns:
        What becomes of each convolution larger than 1 x 1, by its name.

    Raises:
        ValueError: An argument is out of its range, or a pattern matches no spatial convolution.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 7), nn.Conv2d(16, 16, 3, padding=1))
        >>> [choice.reason for choice in choose_layers(model).values()]
        ['its kernel is 7 x 7', '']
    """
    if not isinstance(kernel_size, int) or kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(
            f'kernel_size must be an odd integer of at least 3, but is {kernel_size!r}'
        )
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f'num_heads must be an integer of at least 1, but is {num_heads!r}')
    if not isinstance(expansion, int) or expansion < 1:
        raise ValueError(f'expansion must be an integer of at least 1, but is {expansion!r}')
    spatial = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    }
    for pattern in layers:
        if spatial and not any(fnmatchcase(name, pattern) for name in spatial):
            raise ValueError(
                f'{pattern!r} matches no spatial convolution; there are {", ".join(spatial)}'
            )
    choices = {
        name: _choose(conv, num_heads, kernel_size, static, expansion)
        if any(fnmatchcase(name, pattern) for pattern in layers)
        else Choice(None, 'it was not asked for')
        for name, conv in spatial.items()
    }
    if '' in choices and choices[''].attn_cfg is not None:
        choices[''] = Choice(None, 'it is the whole model; put it into an nn.Sequential')
    return choices


def is_plain_convolution(conv: nn.Conv2d) -> bool:
    """Say whether a convolution is one of 1 x 1 or 3 x 3 that keeps the map's size, but for its stride.

    Args:
        conv: The convolution.

    Examples:
        >>> is_plain_convolution(nn.Conv2d(8, 8, 3)), is_plain_convolution(nn.Conv2d(8, 8, 1))
        (False, True)
    """
    return not _why_not(conv) or (conv.kernel_size == (1, 1) and not _why_not(conv, 1))


def write_static_attention(
    layer: LocalSelfAttention2d,
    fitted: StaticAttention,
    generator: Optional[torch.Generator] = None,
) -> None:
    """Set a layer's weights, such that its windows are those of a static attention.

    The query's bias makes the preferences of the relative positions. The weights of queries and keys are
    zero, if there are any; both learn from there, as the bias gives keys a gradient, and the positions give
    one to queries.

    Args:
        layer: What :func:`sasa_det.layers.replace.replacement` built.
        fitted: The static attention.
        generator: Draws, on the CPU, what the query's bias leaves of the relative positions.
    """
    with torch.no_grad():
        if not layer.constant_query:
            nn.init.zeros_(layer.query.weight)
        if layer.key is not None:
            nn.init.zeros_(layer.key.weight)
        _point_heads(layer, fitted.rows, fitted.cols, generator)
        layer.value.weight.copy_(fitted.value.transpose(1, 2).flatten(0, 1))
        # Outside of the map values are zero, as a convolution pads it.
        nn.init.zeros_(layer.value.bias)
        layer.out_proj.weight.copy_(fitted.output.flatten(0, 1).T)
        layer.out_proj.bias.copy_(fitted.bias)


def _why_not(conv: nn.Conv2d, kernel_size: int = 3) -> str:
    """Say why a convolution is not computed from the pixels of a square around each pixel; '' if it is."""
    height, width = conv.kernel_size
    paddings = ('same', conv.dilation) if kernel_size == 3 else ('same', (0, 0))
    for differs, reason in (
        (_class_of(conv) not in _PLAIN, f'it is a {type(conv).__name__}'),
        ((height, width) != (kernel_size,) * 2, f'its kernel is {height} x {width}'),
        (conv.groups != 1, f'it has {conv.groups} groups'),
        (conv.padding not in paddings, f'its padding is {conv.padding}'),
        (conv.padding_mode != 'zeros', f'it pads by {conv.padding_mode}'),
        (conv.stride[0] != conv.stride[1], f'its stride is {conv.stride}'),
        (conv.dilation[0] != conv.dilation[1], f'its dilation is {conv.dilation}'),
    ):
        if differs:
            return reason
    return ''


def _class_of(conv: nn.Conv2d) -> str:
    return f'{type(conv).__module__}.{type(conv).__qualname__}'


def _choose(
    conv: nn.Conv2d, num_heads: int, kernel_size: int, static: bool, expansion: int
) -> Choice:
    reason = _why_not(conv)
    if not reason and conv.in_channels < FEWEST_CHANNELS:
        reason = f'its input has {conv.in_channels} channels'
    if reason:
        return Choice(None, reason)
    # A predictor's outputs are classes and coordinates, which heads do not divide.
    channels = conv.in_channels if conv.out_channels % (2 * num_heads) else conv.out_channels
    # More would have nothing to do: a head sees each of the input's channels once, at nine places.
    channels = min(expansion * channels, min(num_heads, 9) * conv.in_channels)
    # Relative positions need an even number of channels per head.
    while num_heads > 1 and channels % (2 * num_heads):
        num_heads -= 1
    if channels % (2 * num_heads):
        return Choice(None, f'{channels} channels are odd')
    options = dict(kernel_size=kernel_size, num_heads=num_heads, bias=True, out_proj=True)
    if channels // num_heads < _SHARED_DEPTH:
        options.update(position_per_head=True)
    if channels != conv.out_channels:
        options.update(hidden_channels=channels)
    if static:
        options.update(logits='qr', constant_query=True)
    if conv.stride[0] > 1:
        options.update(downsample='query')
    return Choice(options)


def _point_heads(layer: LocalSelfAttention2d, rows: Tensor, cols: Tensor, generator) -> None:
    """Choose query biases and tables whose products are given logits (H, k), up to a constant each."""
    heads, depth = layer.num_heads, layer.hidden_channels // layer.num_heads
    half, entry = depth // 2, depth**-0.25
    bias = layer.query.bias.new_zeros(heads, 2, half)
    for axis, (wanted, table) in enumerate(((rows, layer.rel_row), (cols, layer.rel_col))):
        wanted = wanted - wanted.mean(1, keepdim=True)
        # What the bias leaves alone stays random, for queries to find.
        table.copy_(entry * torch.randn(table.shape, generator=generator))
        if len(table) == heads:
            bias[:, axis, 0] = 2**0.5 * entry
            table[:, 0] = wanted / (2**0.5 * entry)
            continue
        rank = min(half, heads, wanted.shape[1] - 1)
        left, strength, right = torch.linalg.svd(wanted, full_matrices=False)
        left, right = left[:, :rank] * strength[:rank], right[:rank]
        # Biases as large as queries usually are.
        size = entry * half**0.5 / left.norm(dim=1).mean().clamp(min=1e-6)
        bias[:, axis, :rank] = left * size
        table[0, :rank] = right / size
    layer.query.bias.copy_(bias.flatten())
