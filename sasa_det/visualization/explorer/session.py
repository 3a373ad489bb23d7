"""How the page uses a detector: layers, detections, attention."""

from threading import Lock
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
from mmdet.apis import inference_detector
from torch import nn

from ...evaluation.attention_maps import AttentionMap, attention_maps
from .layers import Layer, find_layers


class Detection(NamedTuple):
    """A detected object.

    Attributes:
        name: Its class.
        score: From 0 to 1.
        box: Left, top, right and bottom, in pixels of the image.
    """

    name: str
    score: float
    box: Tuple[float, float, float, float]


class Explorer:
    """A detector, its detections in an image, and its layers' attention there.

    It runs one call at a time; further calls wait.

    Args:
        model: A detector from :func:`sasa_det.checkpoints.detector.load_detector`.
        score_thr: The lowest score of a detection.

    Raises:
        ValueError: No layer of the model attends.

    Examples:
        >>> explorer = Explorer(load_detector(config, 'epoch_8.pth')) # doctest: +SKIP
        >>> explorer.look(image, explorer.layers[0].name, None, (90, 120)) # doctest: +SKIP
        AttentionMap(layer='backbone.layer1.0.conv2.conv', ...)
    """

    def __init__(self, model: nn.Module, score_thr: float = 0.3) -> None:
        self.layers: List[Layer] = find_layers(model)
        if not self.layers:
            raise ValueError('no layer of this detector attends, so there is nothing to explore')
        self.score_thr = score_thr
        self._model = model
        self._lock = Lock()

    def layer(self, name: str) -> Layer:
        """Find a layer by its name.

        Args:
            name: As in :attr:`layers`.

        Raises:
            ValueError: There is none of that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(f'There is no attention layer {name!r}.')

    def detect(self, image: np.ndarray) -> List[Detection]:
        """Find the objects in an image, highest scores first.

        Args:
            image: (H, W, 3) BGR, uint8.
        """
        with self._lock:
            found = inference_detector(self._model, image).pred_instances.cpu()
        found = found[found.scores >= self.score_thr]
        classes = self._model.dataset_meta['classes']
        triples = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist())
        detections = [Detection(classes[n], score, tuple(box)) for n, score, box in triples]
        return sorted(detections, key=lambda detection: -detection.score)

    def look(
        self, image: np.ndarray, name: str, level: Optional[str], point: Tuple[int, int]
    ) -> AttentionMap:
        """Compute the attention of one pixel in one layer.

        Args:
            image: (H, W, 3) BGR, uint8.
            name: The layer's name.
            level: One of its levels; ignored if it has none.
            point: Row and column of the pixel.

        Raises:
            ValueError: No such layer, level or pixel; names the existing ones.
        """
        layer = self.layer(name)
        if layer.levels and level not in layer.levels:
            raise ValueError(
                f'{layer.title} has no level {level!r}; there are {", ".join(layer.levels)}.'
            )
        height, width = image.shape[:2]
        row, col = point
        if not (0 <= row < height and 0 <= col < width):
            raise ValueError(
                f'There is no pixel x = {col}, y = {row}: x goes from 0 to {width - 1}, '
                f'y from 0 to {height - 1}.'
            )
        number = layer.levels.index(level) if layer.levels else 0
        with self._lock:
            (found,) = attention_maps(self._model, image, [name], [(row, col)], number)
        return found
