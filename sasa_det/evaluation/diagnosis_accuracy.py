"""How much accuracy does a detector owe to each term of its attention's logits?"""

from contextlib import ExitStack, contextmanager
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..layers import LocalSelfAttention2d
from ..layers.projection import ConstantProjection, new_projection
from .attention_maps import attention_layers

# What is taken away from the logits, and how a table calls what is left.
AWAY = {
    'q.k': 'without q.k',
    'q.r': 'without q.r',
    'pixel': 'with the same weights at every pixel',
}


class Case(NamedTuple):
    """A detector with something taken away from its logits.

    Attributes:
        away: A key of ``AWAY``; None for the detector as it was trained.
        layer: The only layer that it is taken from; None for all layers.
    """

    away: Optional[str] = None
    layer: Optional[str] = None


def list_cases(model: nn.Module, per_layer: bool = False) -> List[Case]:
    """List what can be taken away from a model, after the model as it was trained.

    Args:
        model: The model.
        per_layer: Whether to list each layer by itself, too.

    Examples:
        >>> model = nn.Sequential(LocalSelfAttention2d(8, num_heads=2, logits='qr'))
        >>> [case.away for case in list_cases(model)]
        [None, 'q.r', 'pixel']
    """
    layers = attention_layers(model)
    cases = [Case()]
    for name in (None, *(layers if per_layer else ())):
        taken = layers.values() if name is None else (layers[name],)
        cases += [Case(away, name) for away in AWAY if any(_has(each, away) for each in taken)]
    return cases


@contextmanager
def taken_away(model: nn.Module, case: Case, queries: Mapping[str, Tensor]) -> Iterator[None]:
    """Take something away from the logits of a model's attention, for a while.

    Nothing is trained anew. Without q.k the keys are zero, and without q.r the relative positions are. For
    the same weights at every pixel the keys are zero, and each query is the mean query.

    Args:
        model: The model.
        case: What to take away, and from which layers.
        queries: By layer, the mean query (C,), as in
            :class:`~sasa_det.evaluation.diagnosis.LayerDiagnosis`.

    Examples:
        >>> model = nn.Sequential(LocalSelfAttention2d(8, num_heads=2))
        >>> with taken_away(model, Case('q.k'), {}):
        ...     print(bool(model[0].key.weight.any()))
        False
        >>> bool(model[0].key.weight.any())
        True
    """
    layers = attention_layers(model)
    names = layers if case.layer is None else (case.layer,)
    with ExitStack() as changes:
        for name in names if case.away else ():
            for attribute, value in _replacements(layers[name], case.away, queries.get(name)):
                changes.enter_context(_set(layers[name], attribute, value))
        yield


def measure(
    model: nn.Module,
    cases: List[Case],
    queries: Mapping[str, Tensor],
    run: Callable[[Case], Dict[str, float]],
) -> Dict[Case, Dict[str, float]]:
    """Evaluate a model in each of some cases.

    Args:
        model: The model, which is left as it was.
        cases: From :func:`list_cases`.
        queries: As for :func:`taken_away`.
        run: Evaluates the model as it is then, such as by :func:`~sasa_det.evaluation.accuracy.evaluate`.

    Returns:
        The numbers of each case, the main one first as mmdet's evaluators have it. CocoMetric gives no
        numbers where a detector finds nothing; they are zero here. If it never finds anything, there are none.
    """
    found = {}
    for case in cases:
        with taken_away(model, case, queries):
            found[case] = run(case)
    names = next(filter(None, found.values()), {})
    return {case: numbers or dict.fromkeys(names, 0.0) for case, numbers in found.items()}


def _has(layer: LocalSelfAttention2d, away: str) -> bool:
    has_keys, has_positions = layer.key is not None, layer.rel_row is not None
    if away == 'pixel':
        return has_keys or (has_positions and not layer.constant_query)
    return has_keys if away == 'q.k' else has_positions


def _replacements(layer: LocalSelfAttention2d, away: str, query: Optional[Tensor]) -> dict:
    """Name the attributes of a layer to replace, and by what."""
    found, like = {}, next(layer.value.parameters())
    if away != 'q.r' and layer.key is not None:
        key = new_projection(layer.in_channels, layer.hidden_channels, bias=False)
        found['key'] = _frozen(key.to(like), torch.zeros(()))
    if away == 'q.r' and layer.rel_row is not None:
        for name in ('rel_row', 'rel_col'):
            found[name] = nn.Parameter(torch.zeros_like(getattr(layer, name)), requires_grad=False)
    if away == 'pixel' and layer.rel_row is not None:
        found['query'] = _frozen(ConstantProjection(layer.hidden_channels).to(like), query)
    return found.items()


def _frozen(projection: nn.Module, values: Tensor) -> nn.Module:
    (parameter,) = projection.requires_grad_(False).parameters()
    parameter.copy_(values)
    return projection


@contextmanager
def _set(module: nn.Module, attribute: str, value) -> Iterator[None]:
    before = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, before)
