"""What do the heads of a detector attend to, and does the content of the pixels matter to them?"""

import math
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..layers.local_self_attention import AttentionTerms
from .attention_maps import attention_layers, watch_inputs

# A head counts as static if at this share of the pixels, less than that share of the weight is elsewhere than
# in the head's mean map.
MOST_PIXELS, LITTLE_WEIGHT = 0.99, 0.05
# Query pixels per image and layer.
POINTS = 64


class HeadDiagnosis(NamedTuple):
    """What one head attends to, on average over query pixels.

    The three shares add up to one. They divide the variance of the logits over a window and over pixels,
    without each window's mean, which the softmax ignores.

    Attributes:
        entropy: Of the weights, divided by log(k * k): 1 for equal weights, 0 for a single cell.
        entropy_nats: The same in nats.
        largest_weight: Of a window's weights, the largest.
        dy: Rows from the pixel down to the weights' centre, in pixels of the layer's map.
        dx: Columns to the right, likewise.
        share_qk: Share of the variance that q.k causes by differing between pixels.
        share_qr: Share that q.r causes by differing between pixels.
        share_fixed: Share that is the same at every pixel.
        moved: Share of a pixel's weight that is elsewhere than in the head's mean map.
        static: Whether the head never moves: at 99 of 100 pixels, that share is below 0.05.
    """

    entropy: float
    entropy_nats: float
    largest_weight: float
    dy: float
    dx: float
    share_qk: float
    share_qr: float
    share_fixed: float
    moved: float
    static: bool


class LayerDiagnosis(NamedTuple):
    """What the heads of one layer attend to.

    Attributes:
        heads: One entry per head.
        weights: (num_heads, k, k), the mean map of each head.
        query: (C,), the mean query.
        pixels: Number of query pixels.
    """

    heads: List[HeadDiagnosis]
    weights: Tensor
    query: Tensor
    pixels: int


def diagnose(
    model: nn.Module,
    images: Iterable,
    points: int = POINTS,
    seed: int = 0,
) -> Dict[str, LayerDiagnosis]:
    """Diagnose the attention layers of a model on some images.

    A layer that runs once per pyramid level is diagnosed over all levels. Each level has query pixels in
    proportion to its size.

    Args:
        model: A detector from ``mmdet.apis.init_detector``; for tensors, any module.
        images: Each as :func:`~sasa_det.evaluation.attention_maps.attention_maps` takes one.
        points: Number of query pixels per image and layer, on the first map that the layer sees.
        seed: Of the choice of the query pixels.

    Returns:
        By layer, in the order of ``model.named_modules()``; without layers that never run.

    Examples:
        >>> from sasa_det.layers import LocalSelfAttention2d
        >>> model = nn.Sequential(LocalSelfAttention2d(3, 8, kernel_size=3, num_heads=2))
        >>> found = diagnose(model, [torch.rand(1, 3, 16, 16)])['0']
        >>> found.pixels, len(found.heads), found.weights.shape
        (64, 2, torch.Size([2, 3, 3]))
    """
    layers = attention_layers(model)
    terms: Dict[str, List[AttentionTerms]] = {name: [] for name in layers}
    inputs = {name: _Mean() for name in layers}
    generator = torch.Generator().manual_seed(seed)
    for image in images:
        shares: Dict[str, float] = {}

        def look(name: str, x: Tensor, shares=shares) -> None:
            height, width = x.shape[2:]
            share = shares.setdefault(name, min(1.0, points / (height * width)))
            chosen = _choose_points(height, width, share, generator).to(x.device)
            found = layers[name].attention_terms(x, chosen)
            terms[name].append(AttentionTerms(*map(_as_rows, found)))
            inputs[name].add(x)

        watch_inputs(model, image, layers, look)
    return {
        name: _diagnose_layer(layer, terms[name], inputs[name])
        for name, layer in layers.items()
        if terms[name]
    }


def diagnose_heads(terms: AttentionTerms, dilation: int = 1) -> List[HeadDiagnosis]:
    """Compute the numbers of each head of a layer from its attention at some pixels.

    Args:
        terms: Weights and logits, each (P, num_heads, k, k).
        dilation: Pixels from one position of the window to the next.

    Examples:
        >>> logits = torch.zeros(5, 1, 3, 3)
        >>> logits[:, :, 1, 2] = 50.0
        >>> weights = logits.flatten(2).softmax(-1).view_as(logits)
        >>> (head,) = diagnose_heads(AttentionTerms(weights, None, logits))
        >>> head.dy, head.dx, head.share_fixed, head.static
        (0.0, 1.0, 1.0, True)
    """
    size = terms.weights.shape[-1]
    weights = terms.weights.double().flatten(2)
    mean = weights.mean(0)
    nats = torch.special.entr(weights).sum(-1).mean(0)
    steps = dilation * (torch.arange(size, dtype=torch.double) - size // 2)
    maps = mean.unflatten(1, (size, size))
    moved = (weights - mean).abs().sum(-1) / 2
    columns = dict(
        entropy=nats / math.log(size**2) if size > 1 else nats,
        entropy_nats=nats,
        largest_weight=weights.amax(-1).mean(0),
        dy=maps.sum(2) @ steps,
        dx=maps.sum(1) @ steps,
        moved=moved.mean(0),
        **_shares(terms),
    )
    rows = ({name: round(x[head].item(), 6) for name, x in columns.items()}
            for head in range(len(mean)))  # fmt: skip
    static = (moved.quantile(MOST_PIXELS, 0) < LITTLE_WEIGHT).tolist()
    return [HeadDiagnosis(**row, static=each) for row, each in zip(rows, static)]


def spread(dataset: Dataset, count: int) -> Sequence[dict]:
    """Take images from all over a data set, each as a batch of one.

    Args:
        dataset: A data set of mmdet; its pipeline is that of tests.
        count: How many images, at most.

    Examples:
        >>> [image['inputs'] for image in spread([dict(inputs=i) for i in range(10)], 3)]
        [[0], [4], [9]]
    """
    places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()
    return _Chosen(dataset, places)


def mean_of_heads(diagnoses: Mapping[str, LayerDiagnosis]) -> Dict[str, float]:
    """Average the numbers of all heads of a model; ``static`` is the share of static heads.

    Args:
        diagnoses: From :func:`diagnose`, at least one.
    """
    heads = [head for found in diagnoses.values() for head in found.heads]
    return {
        name: sum(getattr(head, name) for head in heads) / len(heads)
        for name in HeadDiagnosis._fields
    }


class _Chosen(Sequence):
    """Images of a data set, which are read as they are asked for."""

    def __init__(self, dataset: Dataset, places: List[int]) -> None:
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        return pseudo_collate([self.dataset[self.places[index]]])


class _Mean:
    """The mean of each channel over the pixels of maps (B, C, H, W)."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, x: Tensor) -> None:
        self.sum = self.sum + x.sum((0, 2, 3), keepdim=True, dtype=torch.float32)
        self.count += x[:, 0].numel()

    def value(self) -> Tensor:
        return self.sum / self.count


def _diagnose_layer(layer, terms: List[AttentionTerms], inputs: _Mean) -> LayerDiagnosis:
    joined = AttentionTerms(*(None if each[0] is None else torch.cat(each) for each in zip(*terms)))
    # A projection of the mean is the mean of projections. Absolute positions, which a layer adds to its
    # input, are left out: with them there is no q.r, the only use of a mean query.
    with torch.no_grad():
        mean = inputs.value().permute(0, 2, 3, 1).to(next(layer.parameters()))
        query = layer.query(mean).flatten()
    return LayerDiagnosis(
        diagnose_heads(joined, layer.dilation),
        joined.weights.mean(0),
        query,
        len(joined.weights),
    )


def _choose_points(height: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Choose a share of a map's pixels, at least one: rows and columns (P, 2)."""
    count = max(1, round(height * width * share))
    places = torch.randperm(height * width, generator=generator)[:count]
    return torch.stack((places // width, places % width), 1)


def _as_rows(term: Optional[Tensor]) -> Optional[Tensor]:
    return None if term is None else term.float().cpu()


def _shares(terms: AttentionTerms) -> Dict[str, Tensor]:
    """Divide the variance of each head's logits among the terms.

    Variance that both terms cause together, their covariance, is half of each.
    """
    none = torch.zeros_like(terms.weights, dtype=torch.double).flatten(2)
    content, position = (
        none if term is None else _centred(term.double().flatten(2))
        for term in (terms.content, terms.position)
    )
    total = (content + position).square().mean((0, 2))
    # No logits at all are equal at all pixels: all of nothing is static.
    total = total.where(total > 0, torch.ones_like(total))
    content, position = (term - term.mean(0) for term in (content, position))
    moving = content + position
    share_qk, share_qr = ((term * moving).mean((0, 2)) / total for term in (content, position))
    return dict(share_qk=share_qk, share_qr=share_qr, share_fixed=1 - share_qk - share_qr)


def _centred(logits: Tensor) -> Tensor:
    """Subtract each window's mean. Positions that border='mask' leaves out, at -inf, become zero."""
    inside = logits.isfinite()
    logits = logits.where(inside, torch.zeros_like(logits))
    mean = logits.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
    return (logits - mean) * inside
