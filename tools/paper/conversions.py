"""How much of its AP does a converted detector keep? Teachers of several seeds, each converted and trained on.

    python -m tools.paper.conversions retinanet_tiny_digits --work-dir work_dirs/conversions/digits
    python -m tools.paper.conversions retinanet_tiny_bccd --data data/bccd --work-dir work_dirs/conversions/bccd

For each seed: the teacher is trained and converted. The converted one is fine-tuned for 2 and for 4 epochs.
For 4 epochs alike are the teacher, and a detector with attention of random weights whose other weights are the
teacher's. One step runs after the other, each by a command of ``sasa-det``. After each, results.md and
results.json are written. A step that fails is told, and the others go on. The same command goes on after an
interruption or a failure. What follows ``--`` goes to ``sasa-det convert``.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from sasa_det.configs import config_literal, find_config, read_config
from sasa_det.convert.files import converted_checkpoint, write_finetuning
from sasa_det.evaluation.costs import Costs
from sasa_det.experiments.training_run import TrainingRun

from .markdown import as_mean, format_table
from .study import Plan, Step, claim, make_parser, parse, run_command, run_study

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
        claim(folder, dict(config=content.pretty_text, convert=self._convert))
        self._epochs = content.train_cfg.max_epochs
        # With the options in it: fine-tuning, which inherits from it, has epochs of its own.
        self.config = folder / config.name
        content.dump(self.config)

    def plan(self, seeds: int) -> Plan:
        """List the steps, seed by seed.

        Args:
            seeds: Number of seeds, from 0.
        """

        def aps(results):
            return {
                row: {
                    seed: results[_name(seed, row)]
                    for seed in range(seeds)
                    if _name(seed, row) in results
                }
                for row in ROWS
            }

        return Plan(
            [step for seed in range(seeds) for step in self._steps(seed)],
            'AP {:.1f}'.format,
            aps,
            lambda results: as_markdown(aps(results), self.costs()),
        )

    def _steps(self, seed: int) -> List[Step]:
        teacher, converted = _name(seed, TEACHER), _name(seed, CONVERTED)
        tune = partial(self._tune, seed, self._converted_config(seed))
        return [
            Step(teacher, self._epochs, partial(self._train, seed, 'teacher', self.config)),
            Step(converted, CONVERSION_EPOCHS, partial(self._convert_teacher, seed), teacher),
            Step(_name(seed, SHORTLY), SHORT, partial(tune, f'converted_{SHORT}', SHORT), converted),
            Step(_name(seed, TUNED), LONG, partial(tune, f'converted_{LONG}', LONG), converted),
            Step(
                _name(seed, TEACHER_TUNED), LONG,
                partial(self._tune_from_teacher, seed, self.config, f'teacher_{LONG}'), teacher,
            ),
            Step(
                _name(seed, RANDOM), LONG,
                partial(self._tune_from_teacher, seed, self._converted_config(seed), f'random_{LONG}'),
                converted,
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
            run_command(
                [
                    'convert', str(self.config), self._teachers_checkpoint(seed), '--out', str(folder),
                    '--seed', str(seed), *self._convert,
                ],
                folder / 'convert.out',
            )  # fmt: skip
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
    rows = []
    for row, aps in found.items():
        if not aps:
            continue
        whole = sum(found[TEACHER][seed] for seed in aps)
        cost = costs.get('before' if row.startswith('teacher') else 'after')
        rows.append(
            [
                row, str(len(aps)), as_mean(list(aps.values())),
                f'{sum(aps.values()) / whole:.3f}' if whole else '–',
                f'{cost.parameters / 1e6:.3f}' if cost else '–', f'{cost.flops / 1e9:.3f}' if cost else '–',
            ]
        )  # fmt: skip
    titles = ('detector', 'seeds', 'AP', "of the teacher's", 'M parameters', 'GFLOPs')
    text = format_table(titles, rows) + '\n'
    pairs = [
        ap - found[TEACHER_TUNED][seed]
        for seed, ap in found.get(TUNED, {}).items()
        if seed in found[TEACHER_TUNED]
    ]
    if pairs:
        text += (
            f'\nAfter {LONG} epochs alike, the converted detector has {as_mean(pairs, sign="+")} AP more than '
            'the teacher of its seed.\n'
        )
    return text


def _name(seed: int, row: str) -> str:
    return f'seed {seed}, {row}'


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
    parser = make_parser('conversions', __doc__)
    parser.add_argument('config', help="the teacher's config: a file or a name")
    parser.add_argument('--data', type=Path, help="folder of the data (default: the config's)")
    parser.add_argument('--seeds', type=int, default=3, help='number of teachers (default: 3)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    options, convert = parse(parser, argv)

    def make_plan() -> Plan:
        config = find_config(options.config)
        data = data_options(config, options.data.resolve()) if options.data else []
        changes = [*data, *options.cfg_options]
        study = Study(config, options.work_dir, changes, convert)
        return study.plan(options.seeds)

    return run_study('conversions', options, make_plan)


if __name__ == '__main__':
    sys.exit(main())
