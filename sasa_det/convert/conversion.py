"""Turning the convolutions of a trained model into attention, from images without labels."""

import copy
import math
from typing import Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .layers import Choice, choose_layers
from .walk import Calls, Fitted, Stage, walk

# Of the images, the share that measures errors rather than be fitted to.
HELD_OUT = 0.25


class Conversion(NamedTuple):
    """A converted model, and what became of its convolutions.

    Attributes:
        model: The student; the given model is left as it was.
        attention: By name, the arguments of the attention in the place of each convolution, as
            :func:`sasa_det.layers.replace.replace_convolutions` takes them.
        fitted: By name, how well it was fitted, in the order in which the layers run.
        kept: By name, why a spatial convolution stays.
    """

    model: nn.Module
    attention: Dict[str, dict]
    fitted: Dict[str, Fitted]
    kept: Dict[str, str]


def run_all(model: nn.Module, images):
    """Run a model on its input: the only stage of a model without others."""
    return model(images)


def convert(
    model: nn.Module,
    images: Tensor,
    *,
    num_heads: int = 8,
    kernel_size: int = 5,
    layers: Sequence[str] = ('*',),
    static: bool = False,
    expansion: int = 1,
    stages: Sequence[Stage] = (run_all,),
    seed: int = 0,
    choices: Optional[Mapping[str, Choice]] = None,
    done: Optional[Mapping[str, dict]] = None,
    tell: Callable[[str, Optional[Fitted], nn.Module], None] = lambda *_: None,
) -> Conversion:
    """Convert a trained model's 3x3 convolutions to attention, such that it computes nearly the same.

    Layer by layer, values, heads and output projection are fitted to what the convolution computes on the
    images. Before further training the attention is a low-rank convolution: queries and keys have weights
    of zero, so a head looks at the same neighbours from each pixel. A static one stays so.

    Args:
        model: Any model; its batch must be the first dimension of what goes through its convolutions.
        images: Its input (B, C, H, W). The last fourth of them measures the errors.
        num_heads: Heads of each attention.
        kernel_size: Window size in pixels of each attention, odd, at least 3.
        layers: Names of convolutions, or patterns such as ``backbone.*``.
        static: See :func:`sasa_det.convert.layers.choose_layers`.
        expansion: The same.
        stages: What runs the model, one after the other. A stage is run again while layers that it calls
            several times are fitted.
        seed: Of the pixels that layers are fitted to.
        choices: What becomes of each convolution, instead of what the arguments above choose.
        done: State dicts of layers that an interrupted conversion has converted, by name.
        tell: Called before and after each layer is fitted.

    Returns:
        The student, in eval mode, and what became of each convolution.

    Raises:
        ValueError: There are fewer than two images, nothing can be converted, the model's numbers are not
            finite, or an argument is out of range.
        KeyboardInterrupt: It was interrupted; what ``tell`` was given is whole.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        >>> found = convert(model, torch.randn(4, 16, 12, 12))
        >>> type(found.model[0]).__name__, found.fitted['0'].unexplained < 0.8
        ('LocalSelfAttention2d', True)
    """
    if len(images) < 2:
        raise ValueError(f'a conversion needs at least two images, but there are {len(images)}')
    if choices is None:
        choices = choose_layers(model, num_heads, kernel_size, layers, static, expansion)
    attention = {
        name: choice.attn_cfg for name, choice in choices.items() if choice.attn_cfg is not None
    }
    kept = {name: choice.reason for name, choice in choices.items() if choice.attn_cfg is None}
    if not attention:
        why = '; '.join(f'{name}: {reason}' for name, reason in kept.items())
        raise ValueError(f'no convolution of the model can be converted ({why or "it has none"})')
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs, too
        student = copy.deepcopy(model).eval()
        held_out = max(1, round(len(images) * HELD_OUT))
        fitted = walk(student, attention, stages, images, held_out, seed, done, tell)
    kept.update((name, 'these images do not reach it') for name in attention if name not in fitted)
    return Conversion(student, {name: attention[name] for name in fitted}, fitted, kept)


def images_needed(layers: Mapping[str, Tuple[Calls, nn.Conv2d]]) -> int:
    """Count the images that give each layer as many pixels to be fitted to as it has inputs.

    Args:
        layers: How each convolution is called for one image, and the convolution.

    Examples:
        >>> size = torch.Size([1, 64, 10, 10])
        >>> images_needed({'a': ([(size, size)], nn.Conv2d(64, 64, 3))})
        8
    """
    fewest = 0.0
    for calls, conv in layers.values():
        pixels = sum(output[2] * output[3] for _, output in calls)
        fewest = max(fewest, 9 * conv.in_channels / pixels)
    return math.ceil(fewest / (1 - HELD_OUT))
