"""What is in the model zoo? Each family of configs gets a README and a metafile.

Run it by ``python -m tools.paper.model_zoo``. Parameters and FLOPs are counted anew. Accuracies come from
``configs/measured.json``, which ``sasa-det compare`` writes, and from the paper, labelled as such. ``--plot
FILE`` plots the measured accuracies.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
import yaml
from matplotlib.figure import Figure
from mmengine.config import Config

from sasa_det.configs import CONFIGS, read_config
from sasa_det.evaluation.costs import Costs, build_model, count_costs
from sasa_det.experiments.compare import Entry, draw_on

from .markdown import as_mean, format_table, put_between
from .tables import load_paper

BEGIN, END = '<!-- made by python -m tools.paper.model_zoo -->', '<!-- end -->'
PAPER = dict(
    URL='https://arxiv.org/abs/1906.05909', Title='Stand-Alone Self-Attention in Vision Models'
)


class Family(NamedTuple):
    """A folder of configs.

    Args:
        title: Its title.
        task: Its name in metafiles.
        data: The data set.
        size: Height and width of the image to count FLOPs for; None if they are not counted.
    """

    title: str
    task: str
    data: str
    size: Optional[tuple]


FAMILIES = dict(
    retinanet=Family('RetinaNet-R50, part by part', 'Object Detection', 'COCO', (640, 640)),
    paper=Family("The paper's RetinaNet", 'Object Detection', 'COCO', (640, 640)),
    pretrain=Family("The paper's classifiers", 'Image Classification', 'ImageNet-1k', (224, 224)),
    quickstart=Family('A tiny RetinaNet', 'Object Detection', 'Digits', (192, 192)),
    ablations=Family("The paper's ablations, tiny", 'Object Detection', 'Digits', (192, 192)),
    bccd=Family('A tiny RetinaNet on blood cells', 'Object Detection', 'BCCD', (256, 320)),
    # These have layers of many kinds that count_costs does not know.
    other_detectors=Family('Other detectors', 'Object Detection', 'COCO', None),
)


def family_of(folder: str, name: str) -> Family:
    """Find the family with a config's data and size of image; those of ``ablations`` are of two data sets.

    Args:
        folder: One of ``FAMILIES``.
        name: The config's.

    Examples:
        >>> family_of('ablations', 'retinanet_sasa-tiny-qr_bccd').data
        'BCCD'
    """
    return FAMILIES['bccd' if name.endswith('_bccd') else folder]


class Model(NamedTuple):
    """A config that can be trained.

    Args:
        name: Its file name, without the suffix.
        epochs: Number of epochs.
        costs: Its parameters and FLOPs; the latter are 0 if not counted.
        measured: Its entry in ``measured.json``, if it was trained.
        paper: Its row of the paper's tables, if it has one.
    """

    name: str
    epochs: int
    costs: Costs
    measured: Optional[Entry]
    paper: Optional[dict]

    @property
    def paper_accuracy(self) -> Optional[float]:
        """The paper's mAP or top-1 accuracy in per cent."""
        names = ('AP', 'top1', 'heldout_top1')
        return (
            next((self.paper[name] for name in names if name in self.paper), None)
            if self.paper
            else None
        )


def load_measured() -> Dict[str, Entry]:
    """Read the measured results, by config name.

    Examples:
        >>> all(entry.name == name for name, entry in load_measured().items())
        True
    """
    path = CONFIGS / 'measured.json'
    return {
        each['config']: Entry(
            each['config'],
            Costs(*(each[field] for field in Costs._fields)),
            {int(seed): result for seed, result in each['results'].items()},
            each['label'],
            each['epochs'],
            each['batch_size'],
        )
        for each in json.loads(path.read_text())
    }


def find_models(folder: str) -> List[Model]:
    """Build and count each config of a family.

    Args:
        folder: One of ``FAMILIES``.
    """
    measured = load_measured()
    tables = load_paper()['tables'].values()
    papers = {row['config']: row for table in tables for row in table['rows']}
    models = []
    for path in sorted((CONFIGS / folder).glob('*.py')):
        config = Config.fromfile(path)
        models.append(
            Model(
                path.stem,
                config.train_cfg.max_epochs,
                _count(config, family_of(folder, path.stem).size),
                measured.get(path.stem),
                papers.get(f'{folder}/{path.name}'),
            )
        )
    return models


def _count(config: Config, size: Optional[tuple]) -> Costs:
    with torch.device('meta'):  # nothing is computed
        model = build_model(config)
        if size is None:
            return Costs(sum(each.numel() for each in model.parameters()), 0, 0)
        options = {} if config.model.type == 'ImageClassifier' else dict(mode='tensor')
        return count_costs(model, torch.zeros(1, 3, *size), **options)


def as_metafile(folder: str, models: Sequence[Model]) -> str:
    """Write a family's metafile.yml, as mmdet's are.

    Args:
        folder: One of ``FAMILIES``.
        models: Its configs.
    """
    family = FAMILIES[folder]
    collection = f'SASA {folder}'
    entries = []
    for model in models:
        data = family_of(folder, model.name)
        metadata = {
            'Epochs': model.epochs,
            'Parameters (M)': round(model.costs.parameters / 1e6, 2),
        }
        if model.costs.flops:
            metadata['FLOPs (G)'] = round(model.costs.flops / 1e9, 2)
            metadata['Image size'] = list(data.size)
        entry = {
            'Name': model.name,
            'In Collection': collection,
            'Config': f'configs/{folder}/{model.name}.py',
            'Metadata': metadata,
        }
        if model.measured:
            entry['Results'] = [
                {
                    'Task': family.task,
                    'Dataset': data.data,
                    'Metrics': {
                        'box AP': round(model.measured.mean('AP'), 1),
                        'batch size': model.measured.batch_size,
                    },
                }
            ]
        elif model.paper_accuracy is not None:
            metric = 'box AP' if family.task == 'Object Detection' else 'Top 1 Accuracy'
            entry['Metadata'][f'{metric} in the paper, not measured here'] = model.paper_accuracy
        entries.append(entry)
    trained_on = list(dict.fromkeys(family_of(folder, each.name).data for each in models))
    head = {
        'Collections': [
            {
                'Name': collection,
                'Metadata': {
                    'Training Data': trained_on if len(trained_on) > 1 else family.data,
                    'Architecture': [family.title],
                },
                'Paper': PAPER,
                'README': f'configs/{folder}/README.md',
            }
        ],
        'Models': entries,
    }
    return f'# Made by python -m tools.paper.model_zoo.\n{yaml.safe_dump(head, sort_keys=False, width=100)}'


def as_tables(folder: str, models: Sequence[Model]) -> str:
    """Format a family as a Markdown table, or as one for each of its data sets.

    Args:
        folder: One of ``FAMILIES``.
        models: Its configs.
    """
    groups = {}
    for model in models:
        groups.setdefault(family_of(folder, model.name), []).append(model)
    if len(groups) < 2:
        return as_table(FAMILIES[folder], models)
    first = FAMILIES[folder]
    return '\n\n'.join(
        f'### {family.data}\n\n{as_table(family, groups[family])}'
        for family in sorted(groups, key=lambda family: family != first)
    )


def as_table(family: Family, models: Sequence[Model]) -> str:
    """Format models as a Markdown table.

    Args:
        family: What they are trained on.
        models: Its configs.
    """
    metric = 'AP' if family.task == 'Object Detection' else 'top-1'
    columns = ['config', 'epochs', 'M parameters']
    if family.size:
        columns.append(f'GFLOPs at {family.size[0]} x {family.size[1]}')
    has_measured = any(model.measured for model in models)
    has_paper = any(model.paper_accuracy is not None for model in models)
    columns += [f'{metric}, measured'] * has_measured + [f"{metric}, the paper's"] * has_paper
    rows = []
    for model in models:
        cells = [
            f'[{model.name}]({model.name}.py)', str(model.epochs),
            f'{model.costs.parameters / 1e6:.2f}',
        ]  # fmt: skip
        if family.size:
            cells.append(f'{model.costs.flops / 1e9:.2f}')
        if has_measured:
            cells.append(_measured_cell(model.measured))
        if has_paper:
            cells.append('' if model.paper_accuracy is None else str(model.paper_accuracy))
        rows.append(cells)
    return format_table(columns, rows)


def _measured_cell(entry: Optional[Entry]) -> str:
    if entry is None:
        return ''
    seeds = len(entry.results)
    mean = as_mean([result['AP'] for result in entry.results.values()])
    return f'{mean} ({seeds} seed{"s" * (seeds > 1)}, batch {entry.batch_size})'


def draw_measured() -> Figure:
    """Plot AP against FLOPs, one panel per data set with measured results.

    Examples:
        >>> [panel.get_title() for panel in draw_measured().axes]
        ['Digits', 'BCCD']
    """
    measured = load_measured()
    panels = {}
    for folder, family in FAMILIES.items():
        entries = [
            measured[path.stem]
            for path in sorted((CONFIGS / folder).glob('*.py'))
            # Of another batch, a row would not compare.
            if path.stem in measured and measured[path.stem].batch_size == _batch_size(path)
        ]
        if entries:
            # The ablations, on the data of the quickstart, are not drawn.
            panels.setdefault(family.data, entries)
    figure = Figure(figsize=(5.5 * len(panels), 4), layout='constrained')
    for axes, (data, entries) in zip(
        figure.subplots(ncols=len(panels), squeeze=False)[0], panels.items()
    ):
        draw_on(axes, entries)
        axes.set_title(data)
    return figure


def _batch_size(path: Path) -> int:
    return read_config(path).train_dataloader.batch_size


def write(root: Path) -> List[str]:
    """Write each family's README.md, between its markers, and metafile.yml.

    Args:
        root: The folder of the families.

    Returns:
        The files that changed.

    Raises:
        ValueError: A README has no markers.
    """
    changed = []
    for folder in FAMILIES:
        models = find_models(folder)
        readme = root / folder / 'README.md'
        tables = as_tables(folder, models)
        contents = {
            readme: put_between(readme.read_text(), BEGIN, END, tables, readme),
            root / folder / 'metafile.yml': as_metafile(folder, models),
        }
        for path, content in contents.items():
            if not path.is_file() or path.read_text() != content:
                path.write_text(content)
                changed.append(str(path))
    return changed


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status: 1 if a check finds a file to change.
    """
    parser = argparse.ArgumentParser(
        prog='python -m tools.paper.model_zoo',
        description='Write the README and metafile of each family.',
    )
    parser.add_argument('--plot', metavar='FILE', help='also draw AP against FLOPs')
    arguments = parser.parse_args(argv)
    if arguments.plot:
        draw_measured().savefig(arguments.plot, dpi=100)
    changed = write(CONFIGS)
    for path in changed:
        print(f'written: {path}')
    return 1 if changed else 0


if __name__ == '__main__':
    sys.exit(main())
