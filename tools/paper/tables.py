"""Do our models cost what the paper says? Builds each row of its tables and compares the costs.

``python -m tools.paper.tables`` prints the tables and fails if a deviation is larger than stated.
The paper's figures, the configs and the allowed deviations are in ``tables.json``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table

from sasa_det.configs import CONFIGS
from sasa_det.evaluation.costs import Classifier, Costs, build_model, count_costs

from .markdown import format_table
from .search import CHOICES, Fit, search_detectors

CLASSIFIER_SIZE, DETECTOR_SIZE = 224, 640
CONVENTION = (
    'FLOPs: one multiply-add counts as two. Convolutions, linear layers and attention count; norms, '
    "activations and pooling do not. In the paper's way of counting, q.r costs k * k per channel and "
    "pixel, as q.k does, and each mixture of the stem's values costs one projection. As computed here, "
    'q.r costs k, and the mixtures are mixed before the projection.'
)
_ACCURACIES = dict(top1='top-1', heldout_top1='top-1 on the held-out split', AP='AP')


class Row(NamedTuple):
    """A row of a table with its costs.

    Args:
        paper: The row as in ``tables.json``.
        costs: Our costs.
        bars: Allowed deviation of 'mparams' and of 'gflops'.
    """

    paper: dict
    costs: Costs
    bars: Dict[str, float]

    def ours(self, column: str) -> float:
        """Return our figure in the unit of the paper's column 'mparams' or 'gflops'."""
        if column == 'mparams':
            return self.costs.parameters / 1e6
        return self.costs.paper_flops / 1e9

    def deviation(self, column: str) -> Optional[float]:
        """Return our figure minus the paper's; None if the paper has no such figure."""
        return self.ours(column) - self.paper[column] if column in self.paper else None

    @property
    def deviating(self) -> List[str]:
        """The columns that deviate by more than allowed."""
        return [
            column
            for column, bar in self.bars.items()
            if column in self.paper and abs(self.deviation(column)) > bar
        ]


def cost_config(config: Config) -> Costs:
    """Count parameters and FLOPs: classifiers at 224 px, detectors at 640 px.

    Args:
        config: As for :func:`build_model`.
    """
    with torch.device('meta'):  # nothing is computed
        model = build_model(config)
        if isinstance(model, Classifier):
            return count_costs(model, torch.zeros(1, 3, CLASSIFIER_SIZE, CLASSIFIER_SIZE))
        image = torch.zeros(1, 3, DETECTOR_SIZE, DETECTOR_SIZE)
        return count_costs(model, image, mode='tensor')


def load_paper() -> dict:
    """Read the paper's figures.

    Examples:
        >>> load_paper()['tables']['6']['rows'][0]['gflops']
        6.1
    """
    return json.loads(Path(__file__).with_name('tables.json').read_text())


def cost_table(table: dict) -> List[Row]:
    """Build and cost each row of a table.

    Args:
        table: One of ``load_paper()['tables']``.
    """
    rows = []
    for paper in table['rows']:
        bars = dict(table['bars'])
        if 'gflops_relative' in bars:
            bars['gflops'] = bars.pop('gflops_relative') * paper['gflops']
        rows.append(Row(paper, cost_config(Config.fromfile(CONFIGS / paper['config'])), bars))
    return rows


def reductions(attention: Costs, convolution: Costs) -> Tuple[float, float, float]:
    """Compute the relative savings of parameters, of the paper's FLOPs, and of ours.

    Examples:
        >>> reductions(Costs(3, 6, 5), Costs(4, 10, 10))
        (0.25, 0.4, 0.5)
    """
    return tuple(1 - ours / theirs for ours, theirs in zip(attention, convolution))


HEADLINE_PAIRS = {
    'configs/paper': (
        'paper/retinanet_r50_fpn_paper-1x_coco.py',
        'paper/retinanet_sasa-r50_sasa-fpn_sasa-head_paper-1x_coco.py',
    ),
    'configs/retinanet': (
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        'retinanet/retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco.py',
    ),
}


def headline() -> Dict[str, Tuple[float, float, float]]:
    """Cost the all-convolution and the all-attention detector of each family.

    Returns:
        The :func:`reductions` by family.
    """
    return {
        name: reductions(*(cost_config(Config.fromfile(CONFIGS / path)) for path in reversed(pair)))
        for name, pair in HEADLINE_PAIRS.items()
    }


def _cells(row: Row) -> List[str]:
    cells = [row.paper['name']]
    for column, digits in (('mparams', 2), ('gflops', 2)):
        paper, deviation = row.paper.get(column), row.deviation(column)
        cells += [
            '' if paper is None else f'{paper}',
            f'{row.ours(column):.{digits}f}',
            '' if deviation is None else f'{deviation:+.{digits}f}',
        ]
    cells.append(f'{row.costs.flops / 1e9:.2f}')
    cells.append(next((str(row.paper[name]) for name in _ACCURACIES if name in row.paper), ''))
    cells.append('deviates' if row.deviating else 'fits')
    return cells


def _titles(table: dict) -> List[str]:
    accuracy = next(title for name, title in _ACCURACIES.items() if name in table['rows'][0])
    return [
        'row', 'M parameters, paper', 'ours', 'difference', 'GFLOPs, paper',
        "ours, paper's way of counting", 'difference', 'ours, computed', f'{accuracy}, paper', 'check',
    ]  # fmt: skip


def _rich(title: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify='left')
    for number, name in enumerate(titles):
        table.add_column(name, justify='right' if number else 'left', overflow='fold')
    for row in rows:
        table.add_row(*row)
    return table


def _headline_lines(found: Dict[str, tuple], claim: dict) -> List[str]:
    lines = [
        f'From all convolution to all attention, the paper has {claim["parameters"]:.0%} fewer '
        f'parameters and {claim["flops"]:.0%} fewer FLOPs.'
    ]
    for name, (parameters, paper_flops, flops) in found.items():
        lines.append(
            f'{name}: {parameters:.1%} fewer parameters; {paper_flops:.1%} fewer FLOPs in the '
            f"paper's way of counting, {flops:.1%} fewer as computed here."
        )
    return lines


def _search_rows(fits: Sequence[Fit]) -> List[List[str]]:
    rows = []
    for place, fit in enumerate(fits, 1):
        choices = [
            'yes' if x is True else 'no' if x is False else str(x) for x in fit.reading.values()
        ]
        deviations = [f'{100 * p:+.1f}, {100 * f:+.1f}' for p, f in fit.deviations]
        rows.append([str(place), f'{fit.error:.1%}', *choices, *deviations, fit.against])
    return rows


STEM_CHOICES = dict(num_mixtures=(2, 4, 5, 6, 7, 8), value_kernel_size=(3, 5, 7))


def search_stems() -> List[Tuple[str, int, str, float, float]]:
    """Cost the rows with an attention stem, for each size that the paper leaves open.

    Returns:
        The argument, its value, the row, the paper's GFLOPs, and ours by the paper's count.
    """
    tables = load_paper()['tables']
    rows = dict(
        num_mixtures=[
            row
            for number in '12'
            for row in tables[number]['rows']
            if 'attnstem' in row['config'] and row.get('fpn_and_head') != 'attention'
        ],
        value_kernel_size=[row for row in tables['7']['rows'] if 'convvalue' in row['config']],
    )
    found = []
    for argument, values in STEM_CHOICES.items():
        for value in values:
            for row in rows[argument]:
                config = Config.fromfile(CONFIGS / row['config'])
                config.model.backbone.stem_cfg = {argument: value}
                ours = cost_config(config).paper_flops / 1e9
                found.append((argument, value, row['name'], row['gflops'], ours))
    return found


def _search() -> List[Fit]:
    table = load_paper()['tables']['2']
    conv, attention = (
        Config.fromfile(CONFIGS / table['rows'][n]['config']) for n in (0, len(table['rows']) - 1)
    )
    init_default_scope('mmdet')
    return search_detectors(conv, attention, table['rows'])


def _print(title, titles, rows, markdown: bool, console: Console) -> None:
    if markdown:
        print(f'## {title}\n\n{format_table(titles, rows)}\n')
    else:
        console.print(_rich(title, titles, rows))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status: 1 if a row deviates by more than stated.
    """
    parser = argparse.ArgumentParser(
        prog='python -m tools.paper.tables',
        description="Build each row of the paper's tables from its config and compare the costs.",
        epilog=CONVENTION,
    )
    parser.add_argument('--tables', nargs='+', choices=list(load_paper()['tables']), metavar='N')
    parser.add_argument('--markdown', action='store_true', help='print as docs/paper.md has it')
    parser.add_argument(
        '--search',
        action='store_true',
        help='print every reading of Table 2, the best first, and of the stem',
    )
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)

    if arguments.search:
        titles = ['', 'error', *CHOICES]
        titles += [
            'conv, conv',
            'conv, stem',
            'conv, full',
            'attn, stem',
            'attn, full',
            'against it',
        ]
        title = 'Readings of Table 2; deviations of parameters and FLOPs in per cent'
        _print(title, titles, _search_rows(_search()), arguments.markdown, console)
        titles = ['argument of the stem', 'value', 'row', 'GFLOPs, paper', 'ours', 'difference']
        rows = [
            [argument, str(value), name, f'{paper}', f'{ours:.2f}', f'{ours - paper:+.2f}']
            for argument, value, name, paper, ours in search_stems()
        ]
        _print('Attention stems', titles, rows, arguments.markdown, console)
        return 0

    paper = load_paper()
    failed = []
    for number in arguments.tables or paper['tables']:
        table = paper['tables'][number]
        rows = cost_table(table)
        title = f'Table {number}: {table["title"]}'
        _print(title, _titles(table), [_cells(row) for row in rows], arguments.markdown, console)
        failed += [
            f'Table {number}, {row.paper["name"]}, {column}: {row.ours(column):.3f} instead of '
            f'{row.paper[column]}'
            for row in rows
            for column in row.deviating
        ]
    if arguments.tables is None:
        found = headline()
        print('\n\n'.join(_headline_lines(found, paper['headline'])))
        failed += [
            f'{name}: less is saved than the paper claims'
            for name, (parameters, paper_flops, _) in found.items()
            if parameters < paper['headline']['parameters']
            or paper_flops < paper['headline']['flops']
        ]
    print(f'\n{CONVENTION}')
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
