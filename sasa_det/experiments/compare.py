"""How do configs compare? Train each with several seeds, and report accuracy against cost.

``sasa-det compare CONFIG... --work-dir DIR --seeds 3`` writes a table, a plot and JSON, updated
after each run. After an interruption the same command resumes. ``--sweep KEY=V1,V2`` compares each config
at the best of some settings.
"""

import json
import math
import signal
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

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
from .sweep import as_cfg_options, describe, folder_name, read_sweep, short_names
from .training_run import RunFailed, TrainingRun

COLUMNS = dict(
    AP='AP', AP50='AP50', AP75='AP75', train_seconds='training, s', train_mb='training, MB',
    test_ms='inference, ms per image', test_mb='inference, MB',
)  # fmt: skip
# Of runs with AttentionDiagnosisHook.
DIAGNOSED = dict(entropy='entropy', share_qk='share of q.k')


class Entry(NamedTuple):
    """A config and its finished runs.

    Args:
        name: The config's.
        costs: For one test image.
        results: The result of :meth:`TrainingRun.finish`, by seed.
        label: Its label in a plot's legend; None for its name.
        epochs: Number of epochs of each run.
        batch_size: Images per step and process.
        setting: The chosen value by key of a sweep; None without one.
        tried: All that the sweep tried, each with its 'setting' and its result; a failed one without.
    """

    name: str
    costs: Costs
    results: Dict[int, dict]
    label: Optional[str] = None
    epochs: Optional[int] = None
    batch_size: Optional[int] = None
    setting: Optional[Mapping[str, str]] = None
    tried: Sequence[dict] = ()

    def mean(self, column: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(result[column] for result in self.results.values())

    def has(self, column: str) -> bool:
        """Whether all results have a number."""
        return bool(self.results) and all(column in each for each in self.results.values())

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
    swept = any(entry.setting for entry in entries)
    diagnosed = [key for key in DIAGNOSED if any(entry.has(key) for entry in entries)]
    titles = ['config', 'seeds', 'epochs', 'batch', *['chosen'] * swept, *COLUMNS.values()]
    lines = [[*titles, *(DIAGNOSED[key] for key in diagnosed), 'M parameters', 'GFLOPs']]
    for entry in entries:
        if entry.results:
            cells = [entry.name, str(len(entry.results)), str(entry.epochs), str(entry.batch_size)]
            cells += [describe(entry.setting or {})] * swept
            cells += [_mean_cell(entry, column) for column in (*COLUMNS, *diagnosed)]
            cells += [f'{entry.costs.parameters / 1e6:.3f}', f'{entry.costs.flops / 1e9:.3f}']
            lines.append(cells)
    text = f'{_table(lines)}\nGFLOPs are per image, and a multiply-add counts as two.\n'
    if swept:
        text += (
            '\nEach config is at its best of what was tried with the first seed, which is therefore a '
            f'favourable one. All that was tried:\n\n{_tried_table(entries, diagnosed)}'
        )
    return text


def _mean_cell(entry: Entry, column: str) -> str:
    if not entry.has(column):
        return ''
    digits = 0 if column.endswith(('seconds', 'mb')) else 3 if column in DIAGNOSED else 1
    error = entry.error(column)
    spread = '' if error is None else f' ± {error:.{digits}f}'
    return f'{entry.mean(column):.{digits}f}{spread}'


def _tried_table(entries: Sequence[Entry], diagnosed: Sequence[str]) -> str:
    names = short_names(next(entry.setting for entry in entries if entry.setting))
    lines = [['config', *names.values(), 'AP', *(DIAGNOSED[key] for key in diagnosed)]]
    for entry in entries:
        for each in entry.tried:
            cells = [entry.name, *(each['setting'][key] for key in names)]
            cells.append(f'{each["AP"]:.1f}' if 'AP' in each else 'failed')
            cells += [f'{each[key]:.3f}' if key in each else '' for key in diagnosed]
            lines.append(cells)
    return _table(lines)


def _table(lines: List[List[str]]) -> str:
    ruled = [lines[0], ['---'] * len(lines[0]), *lines[1:]]
    return ''.join(f'| {" | ".join(line)} |\n' for line in ruled)


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
    curves = {name: read_training_log(folder).train for name, folder in folders.items()}
    return _draw_curves(curves, dict(loss='loss', grad_norm="gradient's norm"), yscale='log')


def draw_attention(folders: Dict[str, Path]) -> Optional[Figure]:
    """Plot what heads attend to, over the iterations; None if AttentionDiagnosisHook was in no training.

    Args:
        folders: By config, the folder of one training.
    """
    curves = {name: read_training_log(folder).diagnosis for name, folder in folders.items()}
    if not any(curves.values()):
        return None
    labels = {
        'diagnosis/entropy': "entropy of a head's weights\nover that of equal weights",
        'diagnosis/share_qk': "share of the logits' variance\nthat is q.k's",
    }
    return _draw_curves({name: each for name, each in curves.items() if each}, labels, marker='o')


def _draw_curves(
    curves: Mapping[str, Sequence[dict]], labels: Dict[str, str], yscale: str = 'linear', **style
) -> Figure:
    figure = Figure(figsize=(8, 6), layout='constrained')
    for axes, (key, label) in zip(figure.subplots(len(labels), sharex=True), labels.items()):
        for name, all_records in curves.items():
            records = [record for record in all_records if key in record]
            axes.plot([r['step'] for r in records], [r[key] for r in records], label=name, **style)
        axes.set(yscale=yscale, ylabel=label)
        axes.grid(alpha=0.3)
    axes.set_xlabel('iteration')
    if axes.lines:
        axes.legend(fontsize='small')
    return figure


def write(entries: Sequence[Entry], work_dir: Path) -> None:
    """Write compare.json, compare.md, compare.png and, of the first seeds, training.png.

    If trainings had AttentionDiagnosisHook, attention.png shows it over the first seeds' iterations.

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
            **(dict(setting=e.setting, tried=e.tried) if e.tried else {}),
        )
        for e in entries
    ]
    (work_dir / 'compare.json').write_text(json.dumps(content, indent=2) + '\n')
    (work_dir / 'compare.md').write_text(as_markdown(entries))
    draw(entries).savefig(work_dir / 'compare.png', dpi=120)
    trained = {
        e.label or e.name: _run_dir(work_dir, e.name, e.setting or {}, min(e.results))
        for e in entries
        if e.results
    }
    draw_training(trained).savefig(work_dir / 'training.png', dpi=120)
    attention = draw_attention(trained)
    if attention is not None:
        attention.savefig(work_dir / 'attention.png', dpi=120)


def _run_dir(work_dir: Path, name: str, setting: Mapping[str, str], seed: int) -> Path:
    return work_dir / name / folder_name(setting) / f'seed_{seed}'


def compare(
    configs: Sequence,
    work_dir,
    seeds: int = 3,
    cfg_options: Sequence[str] = (),
    quiet: bool = False,
    sweep: Sequence[str] = (),
) -> List[str]:
    """Finish all runs: all configs with one seed, then with the next.

    With a sweep, the first seed trains each config with each combination of the values. The other seeds
    train it with its best one by AP.

    Args:
        configs: Paths of the configs, with distinct names.
        work_dir: The folder; each run is in its ``NAME/seed_N``, with a sweep in
            ``NAME/KEY=VALUE,.../seed_N``.
        seeds: Number of seeds, from 0.
        cfg_options: Changes to all configs, as mmdet's ``--cfg-options`` takes them.
        quiet: Show no progress.
        sweep: See :func:`~sasa_det.experiments.sweep.read_sweep`; each config must have the keys.

    Returns:
        The failures, one line each.

    Raises:
        ValueError: Two configs have one name, seeds is below 1, a config lacks a key of the sweep, or the
            folder has other runs.

    Examples:
        >>> compare(['a.py', 'b.py'], 'work_dirs/compare', seeds=3)  # doctest: +SKIP
        []
        >>> sweep = ['optim_wrapper.optimizer.lr=0.01,0.02', 'train_dataloader.batch_size=4,8']
        >>> compare(['a.py', 'b.py'], 'work_dirs/sweep', sweep=sweep)  # doctest: +SKIP
        []
    """
    names = [Path(config).stem for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f'configs must have different names, but are {names}')
    if seeds < 1:
        raise ValueError(f'seeds must be at least 1, but is {seeds}')
    settings = read_sweep(sweep)
    paths = dict(zip(names, configs))
    read = {name: read_config(path, cfg_options) for name, path in paths.items()}
    work_dir = Path(work_dir)

    def options(name: str, setting: Mapping[str, str]) -> List[str]:
        return [*cfg_options, *as_cfg_options(setting, read[name], name)]

    def run_of(name: str, setting: Mapping[str, str], seed: int) -> TrainingRun:
        folder = _run_dir(work_dir, name, setting, seed)
        return TrainingRun(paths[name], seed, folder, options(name, setting))

    first, *others = range(seeds)
    tries = [(name, setting) for setting in settings for name in names]
    runs = [run_of(name, setting, first) for name, setting in tries]
    labels = {name: describe_parts(config.model) for name, config in read.items()}
    if len(set(labels.values())) < len(labels) or any(
        key.startswith('model.') for key in settings[0]
    ):
        labels = {}

    def entry_of(name: str, setting: Mapping[str, str], tried: Sequence[dict]) -> Entry:
        config = read_config(paths[name], options(name, setting))
        return Entry(
            name,
            cost_for_test_image(config),
            {},
            labels.get(name),
            config.train_cfg.get('max_epochs'),
            config.train_dataloader.batch_size,
            setting or None,
            tried,
        )

    entries = {name: entry_of(name, settings[0], []) for name in names}
    failed = []
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('{task.description}'),
    )
    console = Console(quiet=quiet)
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task('', total=len(runs) + len(others) * len(names))

        def finish(run: TrainingRun, name: str, setting: Mapping[str, str]) -> Optional[dict]:
            """Return the result; None for a failure, which is noted."""
            what = ', '.join(filter(None, (name, describe(setting), f'seed {run.seed}')))
            try:
                return run.finish(lambda text: progress.update(task, description=f'{what}: {text}'))
            except RunFailed as error:
                failed.append(f'{what}: {error}')
                return None
            finally:
                progress.advance(task)

        for (name, setting), run in zip(tries, runs):
            result, best = finish(run, name, setting), entries[name]
            if setting:
                best.tried.append(dict(setting=setting, **(result or {})))
            if result is not None:
                if not best.results or result['AP'] > best.results[first]['AP']:
                    if best.setting != (setting or None):
                        entries[name] = entry_of(name, setting, best.tried)
                    entries[name].results[first] = result
            write(list(entries.values()), work_dir)
        for seed in others:
            for name, entry in entries.items():
                if sweep and not entry.results:  # all failed, so that none is the best
                    progress.advance(task)
                    continue
                setting = entry.setting or {}
                result = finish(run_of(name, setting, seed), name, setting)
                if result is not None:
                    entry.results[seed] = result
                write(list(entries.values()), work_dir)
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
        failed = compare(
            configs,
            arguments.work_dir,
            arguments.seeds,
            arguments.cfg_options,
            sweep=arguments.sweep,
        )
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
