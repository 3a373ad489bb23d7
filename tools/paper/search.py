"""Which choices for the open details of the paper's Table 2 fit its figures best?"""

import copy
from itertools import product
from typing import Dict, List, NamedTuple, Sequence

import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from sasa_det.evaluation.costs import Costs, count_costs

# P6 comes from P5 or from C5. The rows with convolution in FPN and head settle this for themselves,
# but not for the other rows.
CHOICES = dict(
    size=(600, 640),
    classes=(80, 90),
    conv_p6=('P5', 'C5'),
    attention_p6=('P5', 'C5', 'P5, convolution'),
    out_proj=(False, True),
    predictor=('convolution', 'attention', 'pointwise', 'mix'),
)
# Largest deviation of the rows with convolution in FPN and head.
CONV_PARAMETERS, CONV_FLOPS = 0.5e6, 0.05


class Fit(NamedTuple):
    """The fit of one reading of Table 2.

    Args:
        reading: A choice for each open detail.
        costs: The costs of each row.
        deviations: Our figure over the paper's, minus one, per row: of parameters and of FLOPs.
        against: The objection to the reading, or ''.
        error: Mean absolute deviation, in both columns, of the rows with attention in FPN and head.
    """

    reading: dict
    costs: List[Costs]
    deviations: List[tuple]
    against: str
    error: float


def search_detectors(conv: Config, attention: Config, rows: Sequence[dict]) -> List[Fit]:
    """Cost every reading of Table 2.

    Args:
        conv: Config of the detector without attention.
        attention: Config of the one with full attention.
        rows: Those of the table, with 'fpn_and_head', 'backbone', 'mparams' and 'gflops'.

    Returns:
        One fit per reading: those without an objection first, each group from best to worst.

    Examples:
        >>> search_detectors(conv, attention, rows)[0].reading['predictor']  # doctest: +SKIP
        'pointwise'
    """
    costs = _PartCosts(conv, attention)
    fits = []
    for values in product(*CHOICES.values()):
        reading = dict(zip(CHOICES, values))
        fits.append(_compare(reading, [costs.of_row(reading, row) for row in rows], rows))
    return sorted(fits, key=lambda fit: (bool(fit.against), fit.error))


class _PartCosts:
    """Costs of detectors; each part is built only once."""

    def __init__(self, conv: Config, attention: Config) -> None:
        self.conv, self.attention = conv.model, attention.model
        self.known: Dict[str, Costs] = {}

    def of_row(self, reading: dict, row: dict) -> Costs:
        size = reading['size']
        attends = row['fpn_and_head'] == 'attention'
        backbone = dict(
            self.conv.backbone if row['backbone'] == 'conv' else self.attention.backbone
        )
        if row['backbone'] == 'conv_stem_attention':
            backbone['stem'] = 'conv'
        neck, head = self.neck_and_head(reading, attends)
        return (
            self.of_part(backbone, _maps(size, [3], 0)[0])
            + self.of_part(neck, _maps(size, [256, 512, 1024, 2048], 2))
            + self.of_part(head, _maps(size, [256] * 5, 3))
        )

    def of_part(self, cfg: dict, inputs) -> Costs:
        sizes = [tuple(x.shape) for x in inputs]
        key = f'{cfg} {sizes}'
        if key not in self.known:
            cfg = {name: value for name, value in cfg.items() if name != 'init_cfg'}
            with torch.device('meta'):
                self.known[key] = count_costs(MODELS.build(cfg), inputs)
        return self.known[key]

    def neck_and_head(self, reading: dict, attends: bool) -> tuple:
        """Write a reading down as configs."""
        model = self.attention if attends else self.conv
        neck, head = copy.deepcopy(model.neck), copy.deepcopy(model.bbox_head)
        source = reading['attention_p6' if attends else 'conv_p6']
        neck.add_extra_convs = 'on_input' if source == 'C5' else 'on_output'
        head.num_classes = reading['classes']
        if attends:
            neck.attn_cfg.out_proj = head.attn_cfg.out_proj = reading['out_proj']
            neck.attn_parts = ('outputs',) if 'convolution' in source else ('outputs', 'extras')
            head.attn_parts = ('cls', 'reg', 'predictors')
            if reading['predictor'] == 'convolution':
                head.attn_parts = ('cls', 'reg')
            else:
                head.predictor = reading['predictor']
        return neck, head


def _maps(size: int, channels: Sequence[int], octave: int) -> list:
    """Empty maps of an image; the first has stride 2**octave, each next twice the stride."""
    edges = [-(-size // 2 ** (octave + n)) for n in range(len(channels))]
    return [torch.zeros(1, c, edge, edge, device='meta') for c, edge in zip(channels, edges)]


def _compare(reading: dict, costs: List[Costs], rows: Sequence[dict]) -> Fit:
    against, deviations = '', []
    for cost, row in zip(costs, rows):
        parameters, flops = row['mparams'] * 1e6, row['gflops'] * 1e9
        deviations.append((cost.parameters / parameters - 1, cost.paper_flops / flops - 1))
        if row['fpn_and_head'] == 'conv' and (
            abs(cost.parameters - parameters) > CONV_PARAMETERS
            or abs(deviations[-1][1]) > CONV_FLOPS
        ):
            against = 'the rows with convolution in FPN and head do not fit'
    if 'convolution' in reading['attention_p6']:
        against = 'every 3x3 in the FPN becomes attention'
    attending = [
        abs(deviation)
        for pair, row in zip(deviations, rows)
        if row['fpn_and_head'] == 'attention'
        for deviation in pair
    ]
    return Fit(reading, costs, deviations, against, sum(attending) / len(attending))
