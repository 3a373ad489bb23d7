"""How do our ablations compare with the paper's? Tables 3, 5, 6 and 7 with ours beside them.

``python -m tools.paper.ablations`` writes the tables of ``docs/ablations.md``. Our columns come from
``configs/measured.json``, which ``sasa-det compare`` writes. ``--plot FILE`` plots them.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

from matplotlib.figure import Figure

from sasa_det.configs import CONFIGS
from sasa_det.experiments.compare import Entry

from .markdown import as_mean, format_table, put_between
from .model_zoo import load_measured
from .tables import load_paper

DOCUMENT = CONFIGS.parent / 'docs' / 'ablations.md'
DATA = dict(digits='digits', bccd='BCCD')
BEGIN, END = '<!-- table {}: made by python -m tools.paper.ablations -->', '<!-- end -->'
# By the paper's name of a row, ours without the data set.
OURS = {
    'attention in all stages': 'retinanet_sasa-tiny',
    'convolution in stage 1, attention in 2 to 4': 'retinanet_sasa-tiny-s234',
    'convolution in stages 1 and 2, attention in 3 and 4': 'retinanet_sasa-tiny-s34',
    'convolution in stages 1 to 3, attention in 4': 'retinanet_sasa-tiny-s4',
    'convolution in all stages': 'retinanet_tiny_sasa-fpn_sasa-head',
    'attention in stage 1, convolution in 2 to 4': 'retinanet_sasa-tiny-s1',
    'attention in stages 1 and 2, convolution in 3 and 4': 'retinanet_sasa-tiny-s12',
    'attention in stages 1 to 3, convolution in 4': 'retinanet_sasa-tiny-s123',
    'none': 'retinanet_sasa-tiny-nopos',
    'absolute': 'retinanet_sasa-tiny-abspos',
    'relative': 'retinanet_sasa-tiny-randinit',
    'q.r': 'retinanet_sasa-tiny-qr',
    'q.k + q.r': 'retinanet_sasa-tiny',
    'plain attention': 'retinanet_sasa-tiny-plainstem',
    'a convolution for the values': 'retinanet_sasa-tiny-convvaluestem',
    'position-aware values': 'retinanet_sasa-tiny-attnstem',
}
# Rows that the paper's table lacks.
MORE = {
    '3': {},
    '5': {'relative, heads start at neighbours': 'retinanet_sasa-tiny'},
    '6': {
        'q.k': 'retinanet_sasa-tiny-nopos',
        'the same weights at every pixel': 'retinanet_sasa-tiny-static',
    },
    '7': {'convolution stem': 'retinanet_sasa-tiny'},
}


class Row(NamedTuple):
    """A row of a table.

    Args:
        name: What it ablates.
        paper: The paper's top-1 accuracy in per cent; None if it has no such row.
        measured: Our entry by data set; those of a data set only if all rows of the table have one.
    """

    name: str
    paper: Optional[float]
    measured: Dict[str, Entry]


def find_rows(number: str, measured: Mapping[str, Entry]) -> List[Row]:
    """Put our results beside a table of the paper.

    Args:
        number: '3', '5', '6' or '7'.
        measured: Our entries by the config's name. Those of a data set count only if all rows have one, of
            one batch size and number of epochs.

    Examples:
        >>> [(row.name, row.paper) for row in find_rows('6', {})][:2]
        [('q.r', 76.9), ('q.k + q.r', 77.4)]
    """
    paper = {
        row['name']: row.get('top1', row.get('heldout_top1'))
        for row in load_paper()['tables'][number]['rows']
    }
    names = {**{name: OURS[name] for name in paper}, **MORE[number]}
    entries = {data: [measured.get(f'{ours}_{data}') for ours in names.values()] for data in DATA}
    complete = [
        data
        for data, found in entries.items()
        if all(found) and len({(entry.epochs, entry.batch_size) for entry in found}) == 1
    ]
    return [
        Row(name, paper.get(name), {data: entries[data][place] for data in complete})
        for place, name in enumerate(names)
    ]


def as_table(rows: Sequence[Row]) -> str:
    """Format a table, the accuracies with their order and ours with standard errors.

    Args:
        rows: The table's.
    """
    data = list(rows[0].measured)
    titles = ['', "top-1, the paper's", 'order']
    for each in data:
        titles += [f'AP, {DATA[each]}', 'order']
    columns = [_ranked([row.paper for row in rows], [_number(row.paper) for row in rows])]
    for each in data:
        entries = [row.measured[each] for row in rows]
        columns.append(
            _ranked([entry.mean('AP') for entry in entries], list(map(_spread, entries)))
        )
    table = format_table(
        titles,
        [
            [row.name, *(text for cell in cells for text in cell)]
            for row, *cells in zip(rows, *columns)
        ],
    )
    missing = [DATA[each] for each in DATA if each not in data]
    note = (
        f'\n\nOur rows have not all been trained yet on: {", ".join(missing)}.' if missing else ''
    )
    return table + note


def _ranked(values: Sequence[Optional[float]], texts: Sequence[str]) -> List[tuple]:
    """Put a place in the order, 1 for the best, beside each text."""
    given = [value for value in values if value is not None]
    return [
        (text, '' if value is None else str(1 + sum(other > value for other in given)))
        for value, text in zip(values, texts)
    ]


def _number(value: Optional[float]) -> str:
    return '' if value is None else str(value)


def _spread(entry: Entry) -> str:
    return as_mean([result['AP'] for result in entry.results.values()])


def draw(measured: Mapping[str, Entry]) -> Figure:
    """Plot each table: a panel for the paper and, once measured, one for each of our data sets.

    Args:
        measured: See :func:`find_rows`.
    """
    tables = {number: find_rows(number, measured) for number in MORE}
    figure = Figure(figsize=(12, 11), layout='constrained')
    heights = [len(rows) for rows in tables.values()]
    grid = figure.subplots(len(tables), 1 + len(DATA), squeeze=False, height_ratios=heights)
    for (number, rows), panels in zip(tables.items(), grid):
        panels[0].set_title(f"Table {number}: the paper's top-1", fontsize='small')
        panels[0].plot([row.paper for row in rows], range(len(rows)), 'o', color='gray')
        panels[0].set_yticks(range(len(rows)), [row.name for row in rows], fontsize='small')
        for data, axes in zip(DATA, panels[1:]):
            axes.set_title(f'AP, {DATA[data]}', fontsize='small')
            axes.set_yticks(range(len(rows)), [''] * len(rows))
            for place, row in enumerate(rows):
                entry = row.measured.get(data)
                if entry:
                    error = entry.error('AP')
                    axes.errorbar(entry.mean('AP'), place, xerr=error, marker='o', capsize=4)
        for axes in panels:
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.grid(alpha=0.3)
    return figure


def write(document: Path) -> bool:
    """Write the tables between their markers.

    Args:
        document: The Markdown file.

    Returns:
        Whether it changed.

    Raises:
        ValueError: A table's markers are missing.
    """
    before, measured = document.read_text(), load_measured()
    text = before
    for number in MORE:
        table = as_table(find_rows(number, measured))
        text = put_between(text, BEGIN.format(number), END, table, document)
    if text != before:
        document.write_text(text)
    return text != before


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status: 1 if the document changed.
    """
    parser = argparse.ArgumentParser(
        prog='python -m tools.paper.ablations',
        description="Write the tables of docs/ablations.md: the paper's figures and ours.",
    )
    parser.add_argument('--plot', metavar='FILE', help='also draw them')
    arguments = parser.parse_args(argv)
    if arguments.plot:
        draw(load_measured()).savefig(arguments.plot, dpi=100)
    changed = write(DOCUMENT)
    if changed:
        print(f'written: {DOCUMENT}')
    return int(changed)


if __name__ == '__main__':
    sys.exit(main())
