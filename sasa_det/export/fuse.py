"""Batch normalisation is folded into the layer before it, for inference."""

from copy import deepcopy
from itertools import pairwise
from typing import Iterator, Optional, Tuple

import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.wrappers import Conv2d
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import AttentionStem, LocalSelfAttention2d
from ..layers.attention_stem import MixedValues
from ..layers.projection import is_plain

# Their forward gives the result of conv1, conv2 and conv3 to the norm of the same number.
NUMBERED = (ResNet, BasicBlock, Bottleneck)
# mmcv's and mmengine's own classes compute the same as torch's.
CONVOLUTIONS = (nn.Conv2d, Conv2d)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)


class Shift(nn.Module):
    """Add a constant to each channel, in place.

    Args:
        shift: (C,).

    Shape:
        (B, C, H, W) to the same.

    Examples:
        >>> Shift(torch.tensor([1.0, 2.0]))(torch.zeros(1, 2, 1, 1)).flatten()
        tensor([1., 2.])
    """

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor) -> Tensor:
        """Add the constant."""
        return x.add_(self.shift[:, None, None])


@torch.no_grad()
def fuse(detector: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution or attention before it, for inference.

    In inference, batch normalisation is a scale and a shift of each channel. They go into the weight and the
    bias of the convolution. In an attention layer they go into its output projection. Without one, they go
    into the value projection, since the weights of a window sum to one. With ``border='zeros'``, pixels outside
    of the map take some of the weight and have the value zero. A bias of the values would miss them. So only
    the scale goes into the values there. The shift is added to the layer's output, in place.

    A norm is folded where its input is known to come from the layer before: in mmcv's ConvModule, in
    ``nn.Sequential``, in ResNet and its blocks, and in the attention stem. A layer stays as it is if it has
    hooks or parametrisations, or is of another class, such as a deformable convolution. Norms of other types
    stay, too.

    Args:
        detector: A detector of mmdet, or any other module. It is not changed.

    Returns:
        A copy in eval mode, with the same results up to rounding. It cannot be trained, and its weights do not
        fit the detector's config.

    Examples:
        >>> model = nn.Sequential(LocalSelfAttention2d(8, num_heads=2, border='mask'), nn.BatchNorm2d(8))
        >>> [type(each).__name__ for each in fuse(model)]
        ['LocalSelfAttention2d', 'Identity']
    """
    detector = deepcopy(detector).eval()
    for module in list(detector.modules()):
        if type(module) is AttentionStem:
            _fuse_stem(module)
            continue
        for layer_name, norm_name in list(_pairs(module)):
            layer, norm = getattr(module, layer_name), getattr(module, norm_name)
            if not (_is_foldable(norm) and _takes_fold(layer)):
                continue
            # A copy: the layer may also be in another place, with another norm.
            if isinstance(layer, nn.Conv2d):
                layer, rest = fuse_conv_bn_eval(layer, norm), nn.Identity()
            else:
                layer = deepcopy(layer)
                rest = _fuse_attention(layer, norm)
            setattr(module, layer_name, layer)
            setattr(module, norm_name, rest)
            if getattr(module, 'efficient_conv_bn_eval_forward', None) is not None:
                module.turn_on_efficient_conv_bn_eval(False)  # mmcv's own way reads the norm
    return detector.requires_grad_(False)


def _pairs(module: nn.Module) -> Iterator[Tuple[str, str]]:
    """Name children of which the second takes what the first gives, which nothing else takes."""
    if isinstance(module, ConvModule):
        if module.with_norm and ('conv', 'norm') in pairwise(module.order):
            yield 'conv', module.norm_name
    elif type(module).forward is nn.Sequential.forward:
        yield from pairwise(name for name, _ in module.named_children())
    elif type(module).forward in [kind.forward for kind in NUMBERED]:
        for number in (1, 2, 3):
            names = f'conv{number}', getattr(module, f'norm{number}_name', None)
            if all(name in module._modules for name in names):
                yield names


def _is_foldable(norm: nn.Module) -> bool:
    return type(norm) in NORMS and norm.running_mean is not None and not _has_hooks(norm)


def _takes_fold(layer: nn.Module) -> bool:
    """Say whether a layer is one that is known, as it was written, and nobody looks at its output."""
    if type(layer) in CONVOLUTIONS:
        return not _has_hooks(layer) and 'weight' in layer._parameters
    if type(layer) is not LocalSelfAttention2d or _has_hooks(layer):
        return False
    return is_plain(layer.value if layer.out_proj is None else layer.out_proj)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _scale_and_shift(norm: nn.Module) -> Tuple[Tensor, Tensor]:
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _fuse_attention(layer: LocalSelfAttention2d, norm: nn.Module) -> nn.Module:
    """Fold a norm into the layer before it; return what is left of the norm."""
    scale, shift = _scale_and_shift(norm)
    # The layer may end in a pooling. That is a mean, so a scale and a shift pass through it.
    if layer.out_proj is not None:
        _fold(layer.out_proj, scale, shift)
    elif layer.border == 'mask':
        _fold(layer.value, scale, shift)
    else:
        _fold(layer.value, scale)
        return Shift(shift)
    return nn.Identity()


def _fold(projection: nn.Linear, scale: Tensor, shift: Optional[Tensor] = None) -> None:
    projection.weight = nn.Parameter(projection.weight * scale[:, None])
    terms = [] if projection.bias is None else [projection.bias * scale]
    terms += [] if shift is None else [shift]
    projection.bias = nn.Parameter(sum(terms)) if terms else None


def _fuse_stem(stem: AttentionStem) -> None:
    """Fold the norm of an attention stem, in which pixels outside of the image have no weight."""
    value = stem.value
    if not _is_foldable(stem.norm) or _has_hooks(value):
        return
    scale, shift = _scale_and_shift(stem.norm)
    if isinstance(value, MixedValues):
        # It has no bias. Its positions choose among the matrices, whatever the scale of their rows.
        value.weight = nn.Parameter(value.weight * scale[:, None])
        stem.norm = Shift(shift)
    elif type(value) in CONVOLUTIONS and _takes_fold(value):
        stem.value, stem.norm = fuse_conv_bn_eval(value, stem.norm), nn.Identity()
    elif is_plain(value):
        _fold(value, scale, shift)
        stem.norm = nn.Identity()
