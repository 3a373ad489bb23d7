"""How much of its AP does a converted detector keep? Teachers of several seeds, each converted and trained on.

    python -m tools.paper.conversions retinanet_tiny_digits --work-dir work_dirs/conversions/digits
    python -m tools.paper.conversions retinanet_tiny_bccd --data data/bccd --work-dir work_dirs/conversions/bccd

For each seed: the teacher is trained and converted. The converted one is fine-tuned for 2 and for 4 epochs.
For 4 epochs alike are the teacher, and a detector with attention of random weights whose other weights are the
teacher's. One step runs after the other, each by a command of ``sasa-det``. After each, results.md and
results.json are written. A step that fails is told, and the others go on. The same command goes on after an
interruption or a failure. What follows ``--`` goes to ``sasa-det convert``.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from sasa_det.configs import config_literal, find_config, read_config
from sasa_det.convert.files import converted_checkpoint, write_finetuning
from sasa_det.engine.work_dir_lock import hold_work_dir
from sasa_det.evaluation.costs import Costs
from sasa_det.experiments.compare import Entry
from sasa_det.experiments.training_run import RunFailed, TrainingRun

SHORT, LONG = 2, 4  # epochs of fine-tuning
TEACHER, CONVERTED = 'teacher', 'converted, no training'
SHORTLY, TUNED = f'converted, {SHORT} epochs', f'converted, {LONG} epochs'
TEACHER_TUNED, RANDOM = f'teacher, {LONG} more epochs', f'random attention, {LONG} epochs'
ROWS = (TEACHER, CONVERTED, SHORTLY, TUNED, TEACHER_TUNED, RANDOM)
# An untrained step takes about as long as so many epochs.
CONVERSION_EPOCHS = 2
STARTED = """\
# Written by tools/paper/conversions.py: a config that starts from given weights.
_base_ = {base}

load_from = {checkpoint}
model = dict(backbone=dict(init_cfg=None))
"""


class Step(NamedTuple):
    """One number of the table.

    Attributes:
        row: Of ROWS.
        seed: The teacher's.
        epochs: How long it takes, about.
        after: The row of the same seed that it needs, if any.
        run: Gives the AP; is told the progress.
    """

    row: str
    seed: int
    epochs: int
    after: Optional[str]
    run: Callable[[Callable[[str], None]], float]


class Study:
    """The steps of one config, in a folder.

    Args:
        config: The teacher's config.
        folder: Where all is written.
        options: ``key=value`` each, as ``--cfg-options`` takes them.
        convert: Arguments to ``sasa-det convert``.

    Raises:
        ValueError: The folder holds a study with other settings.
    """

    def __init__(
        self, config: Path, folder: Path, options: Sequence[str] = (), convert: Sequence[str] = ()
    ) -> None:
        self.folder, self._convert = folder, list(convert)
        content = read_config(config, options)
        settings = json.dumps(dict(config=content.pretty_text, convert=self._convert))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / 'settings.json'
        if path.is_file() and path.read_text() != settings:
            raise ValueError(
                f'work_dir {folder} holds results with other settings; name another one'
            )
        path.write_text(settings)
        self._epochs = content.train_cfg.max_epochs
        # With the options in it: fine-tuning, which inherits from it, has epochs of its own.
        self.config = folder / config.name
        content.dump(self.config)

    def steps(self, seed: int) -> List[Step]:
        """List the steps of a seed, in their order.

        Args:
            seed: The seed of all of them.
        """
        converted = partial(self._tune, seed, self._converted_config(seed))
        return [
            Step(TEACHER, seed, self._epochs, None, partial(self._train, seed, 'teacher', self.config)),
            Step(CONVERTED, seed, CONVERSION_EPOCHS, TEACHER, partial(self._convert_teacher, seed)),
            Step(SHORTLY, seed, SHORT, CONVERTED, partial(converted, f'converted_{SHORT}', SHORT)),
            Step(TUNED, seed, LONG, CONVERTED, partial(converted, f'converted_{LONG}', LONG)),
            Step(
                TEACHER_TUNED, seed, LONG, TEACHER,
                partial(self._tune_from_teacher, seed, self.config, f'teacher_{LONG}'),
            ),
            Step(
                RANDOM, seed, LONG, CONVERTED,
                partial(self._tune_from_teacher, seed, self._converted_config(seed), f'random_{LONG}'),
            ),
        ]  # fmt: skip

    def costs(self) -> Dict[str, Costs]:
        """Read what teacher and student cost, 'before' and 'after', from the first report."""
        for path in sorted(self.folder.glob('seed_*/converted/report.json')):
            total = json.loads(path.read_text())['total']
            return {
                when: Costs(total[f'parameters_{when}'], 0, total[f'gflops_{when}'] * 1e9)
                for when in ('before', 'after')
            }
        return {}

    def _of(self, seed: int) -> Path:
        return self.folder / f'seed_{seed}'

    def _converted_config(self, seed: int) -> Path:
        return converted_checkpoint(self._of(seed) / 'converted', self.config).with_suffix('.py')

    def _teachers_checkpoint(self, seed: int) -> str:
        return (self._of(seed) / 'teacher' / 'last_checkpoint').read_text().strip()

    def _train(self, seed: int, name: str, config: Path, tell) -> float:
        return TrainingRun(config, seed, self._of(seed) / name).finish(tell)['AP']

    def _convert_teacher(self, seed: int, tell) -> float:
        folder = self._of(seed) / 'converted'
        report = folder / 'report.json'
        if not report.is_file():
            tell('converting')
            folder.mkdir(exist_ok=True)
            command = [
                sys.executable, '-m', 'sasa_det', 'convert', str(self.config),
                self._teachers_checkpoint(seed), '--out', str(folder), '--seed', str(seed),
                *self._convert,
            ]  # fmt: skip
            output = folder / 'convert.out'
            with output.open('a') as file:
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                tail = '\n'.join(output.read_text(errors='replace').splitlines()[-15:])
                raise RunFailed(f'convert failed with {done.returncode}; {output} ends in\n{tail}')
        return json.loads(report.read_text())['ap']['after']

    def _tune(self, seed: int, config: Path, name: str, epochs: int, tell) -> float:
        tuning = write_finetuning(config, epochs, config.with_name(f'{name}.py'))
        return self._train(seed, name, tuning, tell)

    def _tune_from_teacher(self, seed: int, base: Path, name: str, tell) -> float:
        """Fine-tune a config from the teacher's weights; those that it does not have stay random."""
        start = self._of(seed) / f'{name}_start.py'
        start.write_text(
            STARTED.format(
                base=config_literal(str(base.resolve())),
                checkpoint=config_literal(str(Path(self._teachers_checkpoint(seed)).resolve())),
            )
        )
        return self._tune(seed, start, name, LONG, tell)


class Clock:
    """Estimates the time left, from the epochs done so far in this process."""

    def __init__(self, epochs: int) -> None:
        self._left, self._done, self._begin = epochs, 0.0, time.monotonic()

    def finish(self, epochs: float, worked: bool) -> None:
        """Note that a step is over.

        Args:
            epochs: Its own.
            worked: Whether it took time, rather than being done before.
        """
        self._left -= epochs
        self._done += epochs if worked else 0

    def left(self, part: float = 0.0) -> str:
        """Say how long the rest takes, in words.

        Args:
            part: Epochs of the running step that are done.
        """
        if not self._done + part:
            return f'{self._left:.0f} epochs left'
        each = (time.monotonic() - self._begin) / (self._done + part)
        return f'about {max(0.0, self._left - part) * each / 60:.0f} minutes left'


def run_all(study: Study, seeds: int, tell: Callable[[str], None]) -> List[str]:
    """Run all steps that are not done yet, seed by seed.

    Args:
        study: The study.
        seeds: Number of seeds, from 0.
        tell: Called with lines that say how far it is.

    Returns:
        The failures, one text each.
    """
    steps = [step for seed in range(seeds) for step in study.steps(seed)]
    clock = Clock(sum(step.epochs for step in steps))
    found: Dict[str, Dict[int, float]] = {row: {} for row in ROWS}
    failed = []
    for number, step in enumerate(steps, 1):
        name = f'[{number} of {len(steps)}] seed {step.seed}, {step.row}'
        if step.after is not None and step.seed not in found[step.after]:
            tell(f'{name}: left out, as it needs: {step.after}')
            clock.finish(step.epochs, False)
            continue
        said, worked = set(), False

        def say(text, name=name, said=said):
            epoch = re.match(r'epoch (\d+) of', text)
            if text not in said:
                said.add(text)
                tell(f'{name}: {text}; {clock.left(int(epoch[1]) - 1 if epoch else 0)}')

        begin = time.monotonic()
        try:
            found[step.row][step.seed] = step.run(say)
            tell(f'{name}: AP {found[step.row][step.seed]:.1f}')
        except (RunFailed, OSError, ValueError, KeyError) as error:
            failed.append(f'{name}: {error}')
            tell(f'{name}: FAILED, {error}')
        worked = time.monotonic() - begin > 5
        clock.finish(step.epochs, worked)
        write(study, found)
    return failed


def write(study: Study, found: Dict[str, Dict[int, float]]) -> None:
    """Write results.json and results.md.

    Args:
        study: The study.
        found: AP by row and seed.
    """
    (study.folder / 'results.json').write_text(json.dumps(found, indent=2) + '\n')
    (study.folder / 'results.md').write_text(as_markdown(found, study.costs()))


def as_markdown(found: Dict[str, Dict[int, float]], costs: Dict[str, Costs]) -> str:
    """Format the table: means and standard errors over the seeds.

    Args:
        found: AP by row and seed.
        costs: Of the teacher 'before', of the student 'after'.

    Examples:
        >>> print(as_markdown({TEACHER: {0: 80.0, 1: 82.0}, CONVERTED: {0: 72.0, 1: 73.8}}, {}))
        | detector | seeds | AP | of the teacher's | M parameters | GFLOPs |
        | --- | --- | --- | --- | --- | --- |
        | teacher | 2 | 81.0 ± 1.0 | 1.000 | – | – |
        | converted, no training | 2 | 72.9 ± 0.9 | 0.900 | – | – |
        <BLANKLINE>
    """
    titles = ('detector', 'seeds', 'AP', "of the teacher's", 'M parameters', 'GFLOPs')
    lines = [titles, ['---'] * len(titles)]
    for row, aps in found.items():
        if not aps:
            continue
        whole = sum(found[TEACHER][seed] for seed in aps)
        cost = costs.get('before' if row.startswith('teacher') else 'after')
        lines.append(
            [
                row, str(len(aps)), _mean(aps), f'{sum(aps.values()) / whole:.3f}' if whole else '–',
                f'{cost.parameters / 1e6:.3f}' if cost else '–', f'{cost.flops / 1e9:.3f}' if cost else '–',
            ]
        )  # fmt: skip
    text = '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'
    pairs = {
        seed: ap - found[TEACHER_TUNED][seed]
        for seed, ap in found.get(TUNED, {}).items()
        if seed in found[TEACHER_TUNED]
    }
    if pairs:
        text += (
            f'\nAfter {LONG} epochs alike, the converted detector has {_mean(pairs, "+")} AP more than the '
            'teacher of its seed.\n'
        )
    return text


def _mean(aps: Dict[int, float], sign: str = '') -> str:
    entry = Entry('', None, {seed: dict(AP=ap) for seed, ap in aps.items()})
    error = entry.error('AP')
    return f'{entry.mean("AP"):{sign}.1f}' + ('' if error is None else f' ± {error:.1f}')


def data_options(config: Path, data: Path) -> List[str]:
    """Return ``--cfg-options`` that read a config's data from another folder.

    Args:
        config: A config with data_root.
        data: The folder.

    Examples:
        >>> data_options(find_config('retinanet_tiny_bccd'), Path('/data/cells'))[-1]
        'test_evaluator.ann_file=/data/cells/annotations/instances_val.json'
    """
    content = read_config(config)
    options = [
        f'{split}_dataloader.dataset.data_root={data}/' for split in ('train', 'val', 'test')
    ]
    for split in ('val', 'test'):
        file = Path(content[f'{split}_evaluator'].ann_file).relative_to(content.data_root)
        options.append(f'{split}_evaluator.ann_file={data / file}')
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog='python -m tools.paper.conversions',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help="the teacher's config: a file or a name")
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--data', type=Path, help="folder of the data (default: the config's)")
    parser.add_argument('--seeds', type=int, default=3, help='number of teachers (default: 3)')
    parser.add_argument('--threads', type=int, default=1, help='of each step (default: 1)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    given = list(sys.argv[1:] if argv is None else argv)
    place = given.index('--') if '--' in given else len(given)
    arguments = parser.parse_args(given[:place])
    # Batch systems stop a job by SIGTERM; it is treated as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ['OMP_NUM_THREADS'] = str(arguments.threads)
    try:
        config = find_config(arguments.config)
        options = data_options(config, arguments.data.resolve()) if arguments.data else []
        study = Study(
            config, arguments.work_dir, [*options, *arguments.cfg_options], given[place + 1 :]
        )
        hold_work_dir(arguments.work_dir)
        failed = run_all(study, arguments.seeds, partial(print, flush=True))
    except KeyboardInterrupt:
        print('Interrupted. The same command goes on from the last checkpoint.', file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f'conversions: {error}', file=sys.stderr)
        return 2
    results = arguments.work_dir / 'results.md'
    print(results.read_text())
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
