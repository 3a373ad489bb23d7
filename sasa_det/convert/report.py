"""The report of a conversion: what each layer leaves unexplained, costs before and after, and AP."""

import json
import shlex
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

from ..visualization.conversion_page import draw_tradeoff, render_conversion
from .budget import Budget, Offers, best_sets
from .conversion import Conversion
from .costs import compare_layers, compare_models
from .detectors import PARTS, part_of
from .walk import Calls, Stage


class Tradeoff(NamedTuple):
    """Sets of layers that might be converted, for a picture.

    Attributes:
        kind: Of the budget.
        wanted: Its amount.
        curve: The share of time or FLOPs and the sum of errors of the best sets.
        mixes: Likewise, of all layers of some parts, and of the chosen ones.
        measured: The share of time and the change of AP of the sets that were tried for a budget of AP.
    """

    kind: str
    wanted: float
    curve: List[Tuple[float, float]]
    mixes: Dict[str, Tuple[float, float]]
    measured: List[Tuple[float, float]]


def describe_tradeoff(
    budget: Budget,
    offers: Offers,
    chosen: Sequence[str],
    tried: Mapping[str, float],
    model: nn.Module,
) -> Tradeoff:
    """Compare the layers that a budget chose with other sets of layers.

    Args:
        budget: What was wanted.
        offers: What each layer costs and saves.
        chosen: The layers.
        tried: By the names of layers, with commas between them, the change of AP that was measured.
        model: The convolutional detector.
    """
    parts = {name: part_of(name, model) for name in offers.layers}
    groups = {part: (part,) for part in PARTS}
    groups.update({'neck and head': ('neck', 'head'), 'all': PARTS})
    mixes = {
        group: [name for name in offers.layers if parts[name] in members]
        for group, members in groups.items()
        if set(members) & set(parts.values())
    }
    mixes['chosen'] = list(chosen)
    return Tradeoff(
        budget.kind,
        budget.amount,
        [offers.sums(names) for names in best_sets(offers.layers)],
        {label: offers.sums(names) for label, names in mixes.items()},
        [(offers.sums(names.split(','))[0], change) for names, change in tried.items()],
    )


def make_report(
    settings: str,
    teacher: nn.Module,
    conversion: Conversion,
    stages: Sequence[Stage],
    images: Tensor,
    calls: Mapping[str, Calls],
    ap: Mapping,
    tradeoff: Optional[Tradeoff],
) -> dict:
    """Measure a converted detector beside the convolutional one.

    Args:
        settings: A key of the conversion's settings.
        teacher: The convolutional detector.
        conversion: The converted one.
        stages: What runs them.
        images: What was converted with.
        calls: How each layer is called.
        ap: AP 'before' and 'after' and the number of 'images', or why it is 'missing'.
        tradeoff: What was weighed up for a budget.

    Returns:
        The content of report.json.
    """
    fitted = {name: calls[name] for name in conversion.fitted}
    costs = compare_layers(teacher, conversion.model, fitted, stages, images[:1])
    return dict(
        settings=settings,
        images=len(images),
        size=list(images.shape[2:]),
        ap=dict(ap),
        total=compare_models(teacher, conversion.model, stages, images[:1]),
        layers=[
            dict(layer=name, **fitted._asdict(), **costs[name])
            for name, fitted in conversion.fitted.items()
        ],
        kept=conversion.kept,
        tradeoff=tradeoff and tradeoff._asdict(),
    )


def write_report(report: Mapping, folder: Path, checkpoint: Path, command: str) -> Path:
    """Write report.json and index.html.

    Args:
        report: What :func:`make_report` measured.
        folder: Where to.
        checkpoint: The converted detector's; its config is beside it.
        command: The command that made it.

    Returns:
        Path of the page.
    """
    (folder / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    figure = report['tradeoff'] and draw_tradeoff(report['tradeoff'])
    page = folder / 'index.html'
    page.write_text(
        render_conversion(
            title=f'{checkpoint.stem}: convolutions became attention',
            lead=_lead(report),
            notes=[]
            if 'after' in report['ap']
            else [f'AP was not measured: {report["ap"]["missing"]}'],
            facts=facts(report),
            layers=[
                [
                    row['layer'],
                    f'{row["unexplained"]:.3f}',
                    f'{row["unavoidable"]:.3f}',
                    *_costs(row),
                ]
                for row in report['layers']
            ]
            + [['whole detector', '', '', *_costs(report['total'])]],
            kept=report['kept'],
            figure=figure,
            command=command,
            next_steps=_next_steps(report, checkpoint, command),
        ),
        encoding='utf-8',
    )
    return page


def facts(report: Mapping) -> List[Tuple[str, str]]:
    """Name the numbers that matter most.

    Args:
        report: What :func:`make_report` measured.

    Returns:
        Pairs of name and text.
    """
    parameters, gflops, ms = _costs(report['total'])
    found = [('layers converted', f'{len(report["layers"])}')]
    ap = report['ap']
    if 'after' in ap:
        found.append((f'AP on {ap["images"]} images', f'{ap["before"]:.1f} → {ap["after"]:.1f}'))
    found += [('M parameters', parameters), ('GFLOPs per image', gflops), ('ms per image', ms)]
    return found


def _lead(report: Mapping) -> str:
    height, width = report['size']
    return (
        f'Fitted to {report["images"]} images of {height} x {width} pixels, without labels and without '
        'training.'
    )


def _costs(row: Mapping) -> List[str]:
    return [
        f'{row[f"{key}_before"] / unit:.{digits}f} → {row[f"{key}_after"] / unit:.{digits}f}'
        for key, unit, digits in (('parameters', 1e6, 3), ('gflops', 1, 3), ('ms', 1, 1))
    ]


def _next_steps(report: Mapping, checkpoint: Path, command: str) -> List[Tuple[str, str]]:
    """Name what a reader may want to do now, and by which command."""
    config, weights = (
        shlex.quote(str(path)) for path in (checkpoint.with_suffix('.py'), checkpoint)
    )
    steps = [
        ('measure its AP on all labelled images', f'sasa-det test {config} {weights}'),
        (
            'train it for two epochs at a low learning rate; this needs labels',
            f'{command} --finetune 2',
        ),
        (
            'detect in images of yours',
            f'sasa-det predict IMAGES --config {config} --checkpoint {weights} --out found',
        ),
        (
            'see where each head looks from a pixel that you click',
            f'sasa-det explore {weights} --config {config}',
        ),
    ]
    if '--finetune' in command:
        del steps[1]
    if report['tradeoff'] is None and report['total']['ms_after'] > report['total']['ms_before']:
        steps.append(
            (
                'save FLOPs where that costs the least; this detector gained no time on this machine',
                f'{command} --budget flops=0.8',
            )
        )
    elif report['tradeoff'] is None:
        steps.append(('convert only the layers that are worth it', f'{command} --budget time=0.9'))
    return steps
