"""Where does a detector attend while it trains? Pictures and entropies for the visualizer."""

import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

EDGE = 5  # query pixels per image edge, for the entropy


@HOOKS.register_module()
class AttentionVisualizationHook(Hook):
    """After each evaluation in training, write where heads attend and how widely.

    The run's visualizer gets pictures ``attention_0`` and so on, of the first images of the validation
    data. It also gets a number ``attention_entropy/LAYER`` per attention layer. The visualizer writes to
    TensorBoard or the config's other ``vis_backends``. The entropy is the mean over heads and queries,
    divided by the logarithm of the window's k * k positions. It is 1 for uniform attention and 0 for
    attention to one position. Layers of the bbox_head are evaluated on the finest pyramid level.

    The hook is off unless a config switches it on, by one line:
    ``default_hooks = dict(attention=dict(type='AttentionVisualizationHook'))``.

    Args:
        num_images: Number of images to draw.
        layers: Names of the layers to draw; by default one of each part of the detector.

    Raises:
        ValueError: num_images is below 1. Or, when training starts, a layer does not exist.

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
        """Check that the named layers exist, and log if the model has no attention.

        Args:
            runner: The runner.

        Raises:
            ValueError: A layer to draw is not in the model.
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
        """Draw the pictures and compute the entropies.

        Args:
            runner: The runner.
            metrics: Unused.
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
    """Compute the normalised entropy of attention, from 0 for one position to 1 for a uniform window.

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
    """A grid of points over an image."""
    places = (np.arange(EDGE) + 0.5) / EDGE
    return [(row * size[0], col * size[1]) for row in places for col in places]


def _model_of(runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
