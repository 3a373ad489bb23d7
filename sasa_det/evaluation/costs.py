"""What does a model cost? Parameters and FLOPs, by the paper's convention and as computed here."""

from typing import Callable, NamedTuple, Sequence

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from ..layers import AttentionStem, LocalSelfAttention2d
from ..layers.attention_stem import BLOCK
from ..ops.flop_counters import count_layer_macs


class Costs(NamedTuple):
    """A model's cost for one image.

    Args:
        parameters: Number of learned values.
        paper_flops: FLOPs by the convention of the paper, a multiply-add as two. Relative positions
            cost as much as content, ``C * k * k`` multiply-adds per pixel. Position-aware values
            cost one projection per mixture.
        flops: FLOPs as computed here. Relative positions are the sum of a row and a column term,
            ``C * k``. Mixtures are mixed before the one projection.

    Examples:
        >>> Costs(1, 2, 3) + Costs(10, 20, 30)
        Costs(parameters=11, paper_flops=22, flops=33)
    """

    parameters: int
    paper_flops: int
    flops: int

    def __add__(self, other: 'Costs') -> 'Costs':
        """Add up the parts of a model."""
        return Costs(*map(sum, zip(self, other)))


class Classifier(nn.Module):
    """A classifier built from its config without mmpretrain: backbone, mean, linear layer.

    Args:
        backbone: The backbone, whose last output is classified.
        in_channels: Channels of that output.
        num_classes: Number of classes.
    """

    def __init__(self, backbone: nn.Module, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores (B, num_classes) of images (B, 3, H, W)."""
        return self.fc(self.backbone(x)[-1].mean((2, 3)))


def build_model(config: Config) -> nn.Module:
    """Build a config's detector or classifier, with no weights loaded.

    Args:
        config: A config of mmdet, or of mmpretrain's ImageClassifier; mmpretrain need not be installed.

    Examples:
        >>> from sasa_det.configs import find_config, read_config
        >>> config = read_config(find_config('r26_32xb128-130e_in1k'))
        >>> type(build_model(config).fc).__name__
        'Linear'
    """
    init_default_scope('mmdet')
    model = config.model.copy()
    model.backbone = {name: x for name, x in model.backbone.items() if name != 'init_cfg'}
    if model.type != 'ImageClassifier':
        return MODELS.build(model)
    return Classifier(MODELS.build(model.backbone), model.head.in_channels, model.head.num_classes)


def count_costs(model: nn.Module, *inputs, **options) -> Costs:
    """Run a model and add up the costs of its convolutions, linear layers and attention.

    Normalisation, activation, pooling and softmax are left out, as in the paper, whose ResNet-50
    has 8.2 GFLOPs. On the device 'meta' nothing is computed.

    Args:
        model: Built from this package's layers and torch's convolutions and linear layers.
        inputs: The model's inputs, for one image.
        options: Further inputs, by name.

    Examples:
        >>> count_costs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 10))
        Costs(parameters=224, paper_flops=43200, flops=43200)
    """
    macs = []
    # An attention layer counts its projections itself.
    counted = {
        part
        for module in model.modules()
        if isinstance(module, (LocalSelfAttention2d, AttentionStem))
        for part in module.children()
        if isinstance(part, nn.Linear)
    }
    hooks = [
        module.register_forward_hook(_hook(count, macs))
        for module in model.modules()
        for kind, count in _COUNTS.items()
        if isinstance(module, kind) and module not in counted
    ]
    try:
        with torch.no_grad():
            model(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
    paper, ours = map(sum, zip(*macs)) if macs else (0, 0)
    return Costs(sum(each.numel() for each in model.parameters()), 2 * paper, 2 * ours)


def _hook(count: Callable, macs: list) -> Callable:
    return lambda module, inputs, output: macs.append(count(module, inputs[0].shape, output))


def _convolution(module: nn.Conv2d, shape: Sequence[int], output: Tensor) -> tuple:
    macs = output.numel() * module.weight[0].numel()
    return macs, macs


def _linear(module: nn.Linear, shape: Sequence[int], output: Tensor) -> tuple:
    macs = output.numel() * module.in_features
    return macs, macs


def _attention(module: LocalSelfAttention2d, shape: Sequence[int], output: Tensor) -> tuple:
    batch, _, height, width = shape
    ours = count_layer_macs(module, shape)
    if module.rel_row is None:
        return ours, ours
    # The paper counts q.r at each of the k * k offsets, we a row and a column term.
    more = module.kernel_size * (module.kernel_size - 1)
    return ours + batch * height * width * module.hidden_channels * more, ours


def _stem(module: AttentionStem, shape: Sequence[int], output: Tensor) -> tuple:
    batch, in_channels, height, width = shape
    pixels = batch * height * width
    out_channels = output.shape[1]
    projections = {'mixtures': 3, 'plain': 3, 'conv': 2}[module.values]  # Conv2d counted apart
    ours = pixels * out_channels * (projections * in_channels + 2 * BLOCK**2)
    paper = ours
    if module.values == 'mixtures':
        mixtures = module.value.num_mixtures
        paper += pixels * out_channels * ((mixtures - 1) * in_channels + mixtures)
        ours += BLOCK**2 * mixtures * out_channels * (1 + in_channels)
    return paper, ours


_COUNTS = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    LocalSelfAttention2d: _attention,
    AttentionStem: _stem,
}
