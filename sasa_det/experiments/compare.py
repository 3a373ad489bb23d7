"""How do configs compare? Train each with several seeds, and report accuracy against cost.

``sasa-det compare CONFIG... --work-dir DIR --seeds 3`` writes a table, a plot and JSON, updated
after each run. After an interruption the same command resumes.
"""

import json
import math
import signal
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..cli.parsers import compare as parser
from ..configs import describe_parts, find_config, read_config
from ..engine.work_dir_lock import hold_work_dir
from ..evaluation.costs import Costs, build_model, count_costs
from ..evaluation.training_log import read_training_log
from .training_run import RunFailed, TrainingRun

COLUMNS = dict(
    AP='AP', AP50='AP50', AP75='AP75', train_seconds='training, s', train_mb='training, MB',
    test_ms='inference, ms per image', test_mb='inference, MB',
)  # fmt: skip


class Entry(NamedTuple):
    """A config and its finished runs.

    Args:
        name: The config's.
        costs: For one test image.
        results: The result of :meth:`TrainingRun.finish`, by seed.
        label: Its label in a plot's legend; None for its name.
        epochs: Number of epochs of each run.
        batch_size: Images per step.
    """

    name: str
    costs: Costs
    results: Dict[int, dict]
    label: Optional[str] = None
    epochs: Optional[int] = None
    batch_size: Optional[int] = None

    def mean(self, column: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(result[column] for result in self.results.values())

    def error(self, column: str) -> Optional[float]:
        """Standard error of the mean; None for a single seed.

        Examples:
            >>> Entry('x', None, {0: dict(AP=40.0), 1: dict(AP=42.0)}).error('AP')
            1.0
        """
        values = [result[column] for result in self.results.values()]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def cost_for_test_image(config: Config) -> Costs:
    """Count a detector's costs at the padded size of its first test image.

    Args:
        config: A config of mmdet, with a test_dataloader in COCO's format.
    """
    init_default_scope(config.get('default_scope', 'mmdet'))
    data = DATASETS.build(config.test_dataloader.dataset)[0]
    model = build_model(config)
    batch = dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
    height, width = model.data_preprocessor(batch, False)['inputs'].shape[2:]
    with torch.device('meta'):
        return count_costs(build_model(config), torch.zeros(1, 3, height, width), mode='tensor')


def as_markdown(entries: Sequence[Entry]) -> str:
    """Format finished runs as a table, with means and standard errors over the seeds.

    Args:
        entries: The configs; those without a result are left out.
    """
    titles = ['config', 'seeds', 'epochs', 'batch', *COLUMNS.values(), 'M parameters', 'GFLOPs']
    lines = [titles, ['---'] * len(titles)]
    for entry in entries:
        if entry.results:
            cells = [entry.name, str(len(entry.results)), str(entry.epochs), str(entry.batch_size)]
            for column in COLUMNS:
                error = entry.error(column)
                digits = 0 if column.endswith(('seconds', 'mb')) else 1
                spread = '' if error is None else f' ± {error:.{digits}f}'
                cells.append(f'{entry.mean(column):.{digits}f}{spread}')
            cells += [f'{entry.costs.parameters / 1e6:.3f}', f'{entry.costs.flops / 1e9:.3f}']
            lines.append(cells)
    table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    return f'{table}\n\nGFLOPs are per image, and a multiply-add counts as two.\n'


def draw(entries: Sequence[Entry]) -> Figure:
    """Plot AP against FLOPs, with standard errors.

    Args:
        entries: The configs; those without a result are left out.
    """
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    draw_on(axes, entries)
    axes.set_title('Accuracy against cost')
    return figure


def draw_on(axes: Axes, entries: Sequence[Entry]) -> None:
    """Plot AP against FLOPs, with standard errors, into given axes.

    Args:
        axes: The axes to draw on.
        entries: The configs; those without a result are left out.
    """
    for entry in entries:
        if entry.results:
            flops, ap = entry.costs.flops / 1e9, entry.mean('AP')
            axes.errorbar(
                flops,
                ap,
                yerr=entry.error('AP'),
                marker='o',
                capsize=4,
                label=entry.label or entry.name,
            )
    axes.set(xlabel='GFLOPs per image; a multiply-add counts as two', ylabel='AP')
    axes.grid(alpha=0.3)
    if axes.containers:
        axes.legend(fontsize='small')


def draw_training(folders: Dict[str, Path]) -> Figure:
    """Plot the loss and the gradient norm before clipping, over the iterations.

    Args:
        folders: By config, the folder of one training.
    """
    figure = Figure(figsize=(8, 6), layout='constrained')
    for axes, key, label in zip(
        figure.subplots(2, sharex=True), ('loss', 'grad_norm'), ('loss', "gradient's norm")
    ):
        for name, folder in folders.items():
            records = [record for record in read_training_log(folder).train if key in record]
            axes.plot([r['step'] for r in records], [r[key] for r in records], label=name)
        axes.set(yscale='log', ylabel=label)
        axes.grid(alpha=0.3)
    axes.set_xlabel('iteration')
    if axes.lines:
        axes.legend(fontsize='small')
    return figure


def write(entries: Sequence[Entry], work_dir: Path) -> None:
    """Write compare.json, compare.md, compare.png and, of the first seeds, training.png.

    Args:
        entries: With any number of results.
        work_dir: The folder of the runs, to write to.
    """
    content = [
        dict(
            config=e.name,
            label=e.label,
            epochs=e.epochs,
            batch_size=e.batch_size,
            **e.costs._asdict(),
            results={str(k): r for k, r in e.results.items()},
        )
        for e in entries
    ]
    (work_dir / 'compare.json').write_text(json.dumps(content, indent=2) + '\n')
    (work_dir / 'compare.md').write_text(as_markdown(entries))
    draw(entries).savefig(work_dir / 'compare.png', dpi=120)
    trained = {
        e.label or e.name: work_dir / e.name / f'seed_{min(e.results)}'
        for e in entries
        if e.results
    }
    draw_training(trained).savefig(work_dir / 'training.png', dpi=120)


def compare(
    configs: Sequence,
    work_dir,
    seeds: int = 3,
    cfg_options: Sequence[str] = (),
    quiet: bool = False,
) -> List[str]:
    """Finish all runs: all configs with one seed, then with the next.

    Args:
        configs: Paths of the configs, with distinct names.
        work_dir: The folder; each run is in its ``NAME/seed_N``.
        seeds: Number of seeds, from 0.
        cfg_options: Changes to all configs, as mmdet's ``--cfg-options`` takes them.
        quiet: Show no progress.

    Returns:
        The failures, one line each.

    Raises:
        ValueError: Two configs have one name, seeds is below 1, or the folder has other runs.

    Examples:
        >>> compare(['a.py', 'b.py'], 'work_dirs/compare', seeds=3)  # doctest: +SKIP
        []
    """
    names = [Path(config).stem for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f'configs must have different names, but are {names}')
    if seeds < 1:
        raise ValueError(f'seeds must be at least 1, but is {seeds}')
    work_dir = Path(work_dir)
    runs = {
        (name, seed): TrainingRun(config, seed, work_dir / name / f'seed_{seed}', cfg_options)
        for seed in range(seeds)
        for name, config in zip(names, configs)
    }
    read = {name: read_config(path, cfg_options) for name, path in zip(names, configs)}
    labels = {name: describe_parts(config.model) for name, config in read.items()}
    if len(set(labels.values())) < len(labels):
        labels = {}
    entries = {}
    for name, config in read.items():
        entries[name] = Entry(
            name,
            cost_for_test_image(config),
            {},
            labels.get(name),
            config.train_cfg.get('max_epochs'),
            config.train_dataloader.batch_size,
        )
    failed = []
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('{task.description}'),
    )
    console = Console(quiet=quiet)
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task('', total=len(runs))
        for (name, seed), run in runs.items():

            def tell(text, name=name, seed=seed):
                progress.update(task, description=f'{name}, seed {seed}: {text}')

            try:
                entries[name].results[seed] = run.finish(tell)
            except RunFailed as error:
                failed.append(f'{name}, seed {seed}: {error}')
            write(list(entries.values()), work_dir)
            progress.advance(task)
    return failed


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    arguments = parser().parse_args(argv)
    # Batch systems stop a job by SIGTERM; it is treated as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        configs = [find_config(name) for name in arguments.configs]
        hold_work_dir(arguments.work_dir)
        failed = compare(configs, arguments.work_dir, arguments.seeds, arguments.cfg_options)
    except KeyboardInterrupt:
        print('Interrupted. The same command goes on from the last checkpoint.', file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f'compare: {error}', file=sys.stderr)
        return 2
    print(Path(arguments.work_dir, 'compare.md').read_text())
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0
