"""Pictures and numbers of where attention looks, written while a detector trains."""

import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

EDGE = 5  # queries along each edge of an image, for the entropy


@HOOKS.register_module()
class AttentionVisualizationHook(Hook):
    """Write, after each evaluation in training, where heads look and how widely.

    Pictures ``attention_0`` and so on, of the first images of the validation data, and for each attention
    layer a number ``attention_entropy/LAYER`` go to the run's visualizer, and so to TensorBoard or
    whatever the config names in ``vis_backends``. The entropy is the mean over heads and queries, divided
    by the logarithm of the window's size: 1 where a head looks everywhere alike, 0 where it looks at one
    cell. A head's layers are seen on the finest pyramid level.

    It is off unless a config switches it on, by one line:
    ``default_hooks = dict(attention=dict(type='AttentionVisualizationHook'))``.

    Args:
        num_images: How many images are drawn.
        layers: Names of the layers that are drawn; by default one of each part of the detector.

    Raises:
        ValueError: num_images is below 1; or, when training starts, there is no layer of that name.

    Examples:
        >>> AttentionVisualizationHook(num_images=0)
        Traceback (most recent call last):
            ...
        ValueError: num_images must be an integer of at least 1, but is 0
    """

    priority = 'LOW'

    def __init__(self, num_images: int = 1, layers: Optional[Sequence[str]] = None) -> None:
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f'num_images must be an integer of at least 1, but is {num_images!r}')
        self.num_images = num_images
        self.layers = layers

    @master_only
    def before_train(self, runner) -> None:
        """Say so where there is nothing to see.

        Args:
            runner: The runner.

        Raises:
            ValueError: A layer that is to be drawn is none of the model's.
        """
        from ...evaluation.attention_maps import attention_layers

        found = attention_layers(_model_of(runner))
        unknown = [name for name in self.layers or () if name not in found]
        if unknown:
            raise ValueError(f'layers: {unknown} are no attention layers; there are {list(found)}')
        if not found:
            runner.logger.warning('AttentionVisualizationHook: no layer of this model attends')

    @master_only
    def after_val_epoch(self, runner, metrics: Optional[Dict[str, float]] = None) -> None:
        """Look, and write.

        Args:
            runner: The runner.
            metrics: Not looked at.
        """
        from ...evaluation.attention_maps import attention_layers, attention_maps
        from ...visualization.plots import as_pixels, draw_attention

        model = _model_of(runner)
        names = list(attention_layers(model))
        if not names:
            return
        dataset = runner.val_dataloader.dataset
        step = runner.iter
        entropies: Dict[str, List[float]] = {name: [] for name in names}
        for index in range(min(self.num_images, len(dataset))):
            sample = dataset[index]
            batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
            maps = attention_maps(model, batch, layers=self.layers)
            runner.visualizer.add_image(
                f'attention_{index}', as_pixels(draw_attention(maps)), step=step
            )
            points = _grid(sample['data_samples'].metainfo['ori_shape'][:2])
            for found in attention_maps(model, batch, layers=names, points=points):
                entropies[found.layer].append(entropy(found.weights))
        means = {name: float(np.mean(each)) for name, each in entropies.items() if each}
        runner.visualizer.add_scalars(
            {f'attention_entropy/{name}': mean for name, mean in means.items()}, step=step
        )
        listed = ', '.join(f'{name} {mean:.2f}' for name, mean in means.items())
        runner.logger.info(f'Attention entropy, of 1: {listed}')


def entropy(weights: Tensor) -> float:
    """Compute how widely attention is spread, from 0, at one cell, to 1, alike over the window.

    Args:
        weights: (..., k, k), each k x k summing to one.

    Examples:
        >>> import torch
        >>> entropy(torch.full((1, 2, 3, 3), 1 / 9))
        1.0
        >>> entropy(torch.ones(1, 2, 1, 1))
        0.0
    """
    cells = weights.shape[-1] * weights.shape[-2]
    if cells == 1:
        return 0.0
    bits = -(weights * weights.clamp(min=1e-30).log()).sum((-2, -1))
    return round(float(bits.mean()) / math.log(cells), 6)


def _grid(size: Tuple[int, int]) -> List[Tuple[float, float]]:
    """Points spread over an image of a height and a width."""
    places = (np.arange(EDGE) + 0.5) / EDGE
    return [(row * size[0], col * size[1]) for row in places for col in places]


def _model_of(runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
