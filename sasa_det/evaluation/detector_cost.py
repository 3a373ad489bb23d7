"""What does a detector cost? Parameters and multiply-adds of each part."""

from functools import partial
from typing import Dict, NamedTuple, Tuple

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn

from .attention_maps import attention_layers


class DetectorCost(NamedTuple):
    """A detector's parts and its cost per image.

    Attributes:
        parameters: Number of parameters of each part, such as 'backbone'.
        attention: Number of attention layers of each part.
        macs: Multiply-adds per image, each counted as one.
        size: Height and width of the image.
    """

    parameters: Dict[str, int]
    attention: Dict[str, int]
    macs: int
    size: Tuple[int, int]


def detector_cost(config: Config, size: Tuple[int, int] = (640, 640)) -> DetectorCost:
    """Count the parameters and multiply-adds of a config's detector.

    Counted as by mmdet's ``get_flops.py``, but for an image of a given size, without data.

    Args:
        config: An mmdet config.
        size: Height and width of the image, without padding.

    Raises:
        ValueError: A size is below one.

    Examples:
        >>> from mmengine.hub import get_config
        >>> config = get_config('sasa_det::quickstart/retinanet_sasa-tiny_digits.py')
        >>> cost = detector_cost(config, (64, 96))
        >>> cost.attention, sum(cost.parameters.values())
        ({'backbone': 8, 'neck': 4, 'bbox_head': 8}, 766270)
    """
    if min(size) < 1:
        raise ValueError(f'size must be height and width of at least 1 pixel, but is {size}')
    init_default_scope(config.get('default_scope', 'mmdet'))
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    shape = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    image = torch.zeros(3, *size, dtype=torch.uint8)
    batch = dict(inputs=[image], data_samples=[DetDataSample(metainfo=shape)])
    data = model.data_preprocessor(batch, False)
    model.forward = partial(model.forward, data_samples=data['data_samples'])
    # Additions and the like are not counted, and losses are not called: warnings of them are of no use.
    counter = FlopAnalyzer(model, (data['inputs'],))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return DetectorCost(
        {name: _parameters(part) for name, part in model.named_children() if _parameters(part)},
        {
            name: len(attention_layers(part))
            for name, part in model.named_children()
            if attention_layers(part)
        },
        int(counter.total()),
        size,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
