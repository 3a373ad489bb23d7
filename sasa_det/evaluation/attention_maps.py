"""Where do the heads of a detector's attention layers look?"""

from collections import Counter
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from mmdet.apis import inference_detector
from torch import Tensor, nn

from ..layers import LocalSelfAttention2d


class AttentionMap(NamedTuple):
    """The attention weights of one layer for some query pixels of an image.

    Args:
        layer: Name of the layer in ``model.named_modules()``.
        weights: (P, num_heads, k, k), each k x k summing to one.
        points: (P, 2) row and column of the query pixels in ``image``.
        cells: (P, 2) row and column of the query pixels in the layer's input map.
        map_size: Height and width of the layer's input map.
        stride: Pixels of ``image`` from one cell of the map to the next.
        dilation: Cells from one position of the window to the next.
        image: (H, W, 3) RGB, uint8: the network's input, without padding.
        content: The logits q.k before the softmax, shaped as the weights; None if the layer has none.
        position: The logits q.r of the relative positions, likewise.
    """

    layer: str
    weights: Tensor
    points: Tensor
    cells: Tensor
    map_size: Tuple[int, int]
    stride: int
    dilation: int
    image: np.ndarray
    content: Optional[Tensor] = None
    position: Optional[Tensor] = None

    @property
    def part(self) -> str:
        """The part of the detector that holds the layer, such as 'backbone'."""
        return self.layer.split('.')[0]

    def window(self, index: int) -> Tuple[int, int, int, int]:
        """Top, left, bottom and right edge of a query's window, in pixels of the image."""
        radius = self.weights.shape[-1] // 2 * self.dilation
        row, col = self.cells[index].tolist()
        low, high = -radius, radius + 1
        return tuple(self.stride * (i + j) for j in (low, high) for i in (row, col))


def attention_layers(model: nn.Module) -> Dict[str, LocalSelfAttention2d]:
    """Find the attention layers of a model by name, in the order of ``model.named_modules()``.

    Examples:
        >>> list(attention_layers(nn.Sequential(nn.ReLU(), LocalSelfAttention2d(16))))
        ['1']
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, LocalSelfAttention2d)}


def attention_maps(
    model: nn.Module,
    image: Union[str, np.ndarray, dict, Tensor],
    layers: Optional[Sequence[str]] = None,
    points: Optional[Sequence[Tuple[float, float]]] = None,
    level: int = 0,
) -> List[AttentionMap]:
    """Run a model on one image and return the attention weights of its layers.

    A cell of a layer's map covers ``stride`` x ``stride`` pixels of the image. The stride is the
    power of two that fits both sizes, since detectors halve maps and round up. Each query pixel is
    mapped to its cell.

    Args:
        model: A detector from ``mmdet.apis.init_detector``; for a tensor, any module.
        image: A file name, an (H, W, 3) BGR array, a batch of one from a test pipeline, or a (1, 3,
            H, W) tensor.
        layers: Names from :func:`attention_layers`. By default one per part (backbone, neck,
            bbox_head): the last layer whose map is no smaller than its window, else the last.
        points: Row and column of query pixels, in the original image; by default its centre.
        level: The pyramid level to show, 0 being the finest, of bbox_head layers, which run once
            per level. Layers that run once ignore it.

    Returns:
        One entry per layer; an empty list if the model has no attention.

    Raises:
        ValueError: No such layer or level, a point outside the image, a batch of more than one.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), LocalSelfAttention2d(16))
        >>> (found,) = attention_maps(model, torch.rand(1, 3, 32, 48), points=[(9, 20)])
        >>> found.layer, found.stride, found.cells.tolist(), found.weights.shape
        ('1', 2, [[4, 10]], torch.Size([1, 8, 7, 7]))
    """
    found = attention_layers(model)
    unknown = [name for name in layers or () if name not in found]
    if unknown:
        raise ValueError(f'layers: {unknown} are no attention layers; there are {list(found)}')
    wanted = found if layers is None else {name: found[name] for name in layers}
    inputs, samples, seen = _inputs_at(model, image, wanted, level)
    if layers is None:
        seen = _last_of_each_part(seen, wanted)

    size, scale, shown = _describe(model, inputs, samples)
    points = np.asarray([((size[0] - 1) / 2 / scale[0], (size[1] - 1) / 2 / scale[1])]
                        if points is None else points, dtype=float).reshape(-1, 2)  # fmt: skip
    points = torch.as_tensor(points * scale)
    if (points < 0).any() or (points >= torch.tensor(size)).any():
        raise ValueError(
            f'points: {(points.numpy() / scale).tolist()} are not all inside the image, whose '
            f'height and width are {np.divide(size, scale).round().astype(int).tolist()}'
        )
    maps = []
    for name, x in seen.items():
        height, width = x.shape[-2:]
        stride = _stride(inputs.shape, x.shape)
        cells = (points / stride).long()
        weights, content, position = (
            None if term is None else term.float().cpu()
            for term in wanted[name].attention_terms(x, cells.to(x.device))
        )
        maps.append(
            AttentionMap(
                name,
                weights,
                points,
                cells,
                (height, width),
                stride,
                wanted[name].dilation,
                shown,
                content,
                position,
            )
        )
    return maps


def layer_strides(
    model: nn.Module, image: Union[str, np.ndarray, dict, Tensor]
) -> Dict[str, List[int]]:
    """Find the strides of the maps on which a model calls each of its attention layers.

    Args:
        model: As for :func:`attention_maps`.
        image: Likewise.

    Returns:
        By layer, in the order of first calls: the stride of the input map, per call. A bbox_head's
        layer has one call per pyramid level.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), LocalSelfAttention2d(16))
        >>> layer_strides(model, torch.rand(1, 3, 32, 48))
        {'1': [2]}
    """
    calls = []
    inputs, _ = watch_inputs(
        model, image, attention_layers(model), lambda name, x: calls.append((name, x.shape))
    )
    strides = {}
    for name, shape in calls:
        strides.setdefault(name, []).append(_stride(inputs.shape, shape))
    return strides


def watch_inputs(
    model: nn.Module,
    image: Union[str, np.ndarray, dict, Tensor],
    layers: Mapping[str, nn.Module],
    keep: Callable[[str, Tensor], None],
) -> Tuple[Tensor, Optional[list]]:
    """Run a model on one image, and tell of each input of some of its layers.

    Args:
        model: As for :func:`attention_maps`.
        image: Likewise.
        layers: The layers, by name.
        keep: Is called with name and input before a layer runs. A bbox_head's layers run once per
            pyramid level.

    Returns:
        The model's input (1, C, H, W), and mmdet's data samples of it if there are any.

    Raises:
        ValueError: The image is a batch of more than one.

    Examples:
        >>> model = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
        >>> watch_inputs(model, torch.rand(1, 3, 8, 8), {'1': model[1]}, lambda *x: print(x[1].shape))[1]
        torch.Size([1, 3, 4, 4])
    """
    given = {}

    def keep_input(_, args, kwargs):
        given['inputs'] = args[0] if args else kwargs['inputs']
        given['samples'] = kwargs.get('data_samples')

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0].detach()))
        for name, layer in layers.items()
    ]
    hooks.append(model.register_forward_pre_hook(keep_input, with_kwargs=True))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(image, Tensor):
                model(image)
            elif isinstance(image, dict):
                model.test_step(image)
            else:
                inference_detector(model, image)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    inputs = given['inputs']
    if inputs.dim() != 4 or len(inputs) != 1:
        raise ValueError(f'image: must be one image, but the network got {tuple(inputs.shape)}')
    return inputs, given['samples']


def _inputs_at(model, image, layers, level):
    """Run the model; return its input, mmdet's meta data on it, and the input of each layer."""
    calls, seen = Counter(), {}

    def keep(name, x):
        if calls[name] == level or not calls[name]:
            seen[name] = x
        calls[name] += 1

    inputs, samples = watch_inputs(model, image, layers, keep)
    for name, count in calls.items():
        if 1 < count <= level:
            raise ValueError(f'level: {level}, but {name} is called for {count} levels only')
    return inputs, samples, {name: seen[name] for name in layers if name in seen}


def _last_of_each_part(seen: Dict[str, Tensor], layers) -> Dict[str, Tensor]:
    chosen = {}
    for name, x in seen.items():
        layer = layers[name]
        fits = min(x.shape[-2:]) > layer.dilation * (layer.kernel_size - 1)
        part = name.split('.')[0]
        if fits or not chosen.get(part, (None, False))[1]:
            chosen[part] = (name, fits)
    return {name: seen[name] for name, _ in chosen.values()}


def _stride(image: torch.Size, cells: torch.Size) -> int:
    """Power of two by which an image's height and width, divided and rounded up, give those of a map."""
    stride = 1
    while any(-(-n // stride) > m for n, m in zip(image[-2:], cells[-2:], strict=True)):
        stride *= 2
    return stride


def _describe(model, inputs, samples):
    """Size of the image in the network's input, its scale relative to the file, and its pixels."""
    size, scale = tuple(inputs.shape[-2:]), (1.0, 1.0)
    pixels = inputs[0].float().cpu()
    if samples:
        meta = samples[0].metainfo
        size = tuple(meta.get('img_shape', size)[:2])
        width_scale, height_scale = meta.get('scale_factor', (1.0, 1.0))[:2]
        scale = (height_scale, width_scale)
    preprocessor = getattr(model, 'data_preprocessor', None)
    if getattr(preprocessor, '_enable_normalize', False):
        pixels = pixels * preprocessor.std.cpu() + preprocessor.mean.cpu()
    else:
        pixels = pixels - pixels.min()
        pixels = pixels * (255 / pixels.max().clamp(min=1e-6))
    if samples and not getattr(preprocessor, '_channel_conversion', False):
        pixels = pixels.flip(0)  # mmdet reads BGR, and this model takes it unconverted
    pixels = pixels[:, : size[0], : size[1]].clamp(0, 255).round().byte()
    return size, np.asarray(scale), pixels.permute(1, 2, 0).numpy()
