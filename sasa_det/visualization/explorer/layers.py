"""Which attention layers does a detector have? They get titles for the page's choice."""

import re
from collections import Counter
from typing import List, NamedTuple, Tuple

import numpy as np
from torch import nn

from ...evaluation.attention_maps import attention_layers, layer_strides

_TITLES = (
    (
        r'backbone\.layer(\d+)\.(\d+)\.',
        lambda m, _: f'Backbone, stage {m[1]}, block {int(m[2]) + 1}',
    ),
    (r'neck\.fpn_convs\.\d+\.', lambda _, level: f'FPN, {level}'),
    (r'bbox_head\.cls_convs\.(\d+)\.', lambda m, _: f'Head, class tower, layer {int(m[1]) + 1}'),
    (r'bbox_head\.reg_convs\.(\d+)\.', lambda m, _: f'Head, box tower, layer {int(m[1]) + 1}'),
)


class Layer(NamedTuple):
    """An attention layer.

    Attributes:
        name: Its name in ``model.named_modules()``.
        title: Its title on the page, unique within a detector.
        levels: The pyramid levels that it runs on, such as 'P3'; empty if it runs once.
    """

    name: str
    title: str
    levels: Tuple[str, ...]


def find_layers(model: nn.Module) -> List[Layer]:
    """Find a detector's attention layers, by a run on a black image.

    Args:
        model: A detector from ``mmdet.apis.init_detector``.

    Returns:
        The layers in the order of their calls; an empty list if the model has no attention.
    """
    layers = attention_layers(model)
    found = []
    for name, strides in layer_strides(model, np.zeros((128, 128, 3), np.uint8)).items():
        levels = [_level(stride) for stride in strides]
        title = _title(name, _level(strides[0] * layers[name].stride))
        found.append(Layer(name, title, tuple(levels) if len(levels) > 1 else ()))
    shared = Counter(layer.title for layer in found)
    return [
        layer._replace(title=f'{layer.title} ({layer.name})') if shared[layer.title] > 1 else layer
        for layer in found
    ]


def _level(stride: int) -> str:
    return f'P{stride.bit_length() - 1}'


def _title(name: str, level: str) -> str:
    for pattern, title in _TITLES:
        match = re.match(pattern, name)
        if match:
            return title(match, level)
    return name
