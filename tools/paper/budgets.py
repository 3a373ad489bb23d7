"""Is a budget never worse than a mix of parts that is chosen by hand, at equal time or at equal FLOPs?

    python -m tools.paper.budgets --teachers work_dirs/conversions/digits --work-dir work_dirs/budgets/digits

The teachers are those of a study by ``tools.paper.conversions``, whose folder is only read. Each is converted
in all of its parts, and in each other choice of parts. The time of each such mix over the teacher's is measured
in turns, in one process, by medians. Then ``sasa-det convert --budget`` converts for the time of each mix, and
for the least that can be had. A mix that is slower than the teacher is compared with ``time=1.0``. With
``--kinds time flops`` there is a second table, of budgets of FLOPs. Nothing is trained.

After each step, results.md and results.json are written. The same command goes on after an interruption or a
failure. What follows ``--`` goes to ``sasa-det convert``.
"""

import json
import math
import statistics
import sys
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import torch
from mmengine.config import Config

from sasa_det.checkpoints.detector import load_detector
from sasa_det.convert.costs import alternate
from sasa_det.convert.detectors import DEFAULT_PARTS, find_images, load_images, stages_of
from sasa_det.convert.files import converted_checkpoint
from sasa_det.convert.walk import run_stages
from sasa_det.files import write_whole

from .conversions import CONVERSION_EPOCHS
from .markdown import as_mean, format_table, standard_error
from .study import Plan, Step, claim, make_parser, parse, run_command, run_study

# All parts, each alone, and pairs.
MIXES = {
    '+'.join(parts): parts for count in (3, 1, 2) for parts in combinations(DEFAULT_PARTS, count)
}
KINDS = ('time', 'flops')
LEAST = 'the least that can be had'
# A time within this share of the wanted one counts as equal to it.
TOLERANCE = 0.02
# Rounds in which times are measured, at least.
ROUNDS = 30
# A measurement of times takes about as long as so many epochs.
TIMES_EPOCHS = 1


class Study:
    """The conversions of all teachers, in a folder.

    Args:
        teachers: The folder of a study of conversions.
        folder: Where all is written.
        kinds: Of budgets.
        threads: That times are measured with.
        convert: Arguments to ``sasa-det convert``.

    Raises:
        ValueError: There are no trained teachers, or the folder holds a study with other settings.
    """

    def __init__(
        self,
        teachers: Path,
        folder: Path,
        kinds: Sequence[str] = ('time',),
        threads: int = 1,
        convert: Sequence[str] = (),
    ) -> None:
        self._folder, self._kinds, self._threads = folder, kinds, threads
        self._convert = list(convert)
        configs = sorted(teachers.glob('*.py'))
        # tools.paper.conversions marks what it has trained to the end.
        self._teachers = {
            int(path.parent.parent.name.partition('_')[2]): path.parent
            for path in sorted(teachers.glob('seed_*/teacher/trained'))
        }
        if len(configs) != 1 or not self._teachers:
            raise ValueError(
                f'{teachers} must be a folder of tools.paper.conversions with trained teachers, but has '
                f'{len(configs)} configs and {len(self._teachers)} trained teachers'
            )
        self.config = configs[0]
        settings = dict(teachers=str(teachers.resolve()), threads=threads, convert=self._convert)
        claim(folder, settings)

    def plan(self) -> Plan:
        """List the steps, teacher by teacher."""
        return Plan(
            [step for seed in self._teachers for step in self._steps(seed)],
            _describe,
            dict,
            lambda results: as_markdown(results, list(self._teachers), self._kinds),
        )

    def _steps(self, seed: int) -> List[Step]:
        steps = [
            Step(_name(seed, mix), CONVERSION_EPOCHS, partial(self._convert_parts, seed, mix))
            for mix in MIXES
        ]
        times = _name(seed, 'times')
        steps.append(Step(times, TIMES_EPOCHS, partial(self._measure, seed, 'times', list(MIXES))))
        for kind in self._kinds:
            for mix in MIXES:
                run = partial(self._spend_as, seed, kind, mix)
                steps.append(Step(_name(seed, mix, kind), CONVERSION_EPOCHS, run, times))
            run = partial(self._spend, seed, kind, 'least')
            steps.append(Step(_name(seed, LEAST, kind), CONVERSION_EPOCHS, run))
        return steps

    def _of(self, seed: int) -> Path:
        return self._folder / f'seed_{seed}'

    def _teachers_checkpoint(self, seed: int) -> Path:
        folder = self._teachers[seed]
        # By its name alone, as the folder may have been moved.
        return folder / Path((folder / 'last_checkpoint').read_text().strip()).name

    def _convert_parts(self, seed: int, mix: str, tell) -> Dict[str, float]:
        return self._convert_to(seed, mix, ['--parts', *MIXES[mix]], tell)

    def _convert_to(
        self, seed: int, name: str, options: Sequence[str], tell: Callable[[str], None]
    ) -> Dict[str, float]:
        folder = self._of(seed) / name
        report = folder / 'report.json'
        if not report.is_file():
            tell('converting')
            folder.mkdir(parents=True, exist_ok=True)
            run_command(
                [
                    'convert', str(self.config), str(self._teachers_checkpoint(seed)), '--out', str(folder),
                    '--seed', str(seed), *options, *self._convert,
                ],
                folder / 'convert.out',
            )  # fmt: skip
        content = json.loads(report.read_text())
        total = content['total']
        return dict(
            AP=content['ap']['after'],
            AP_before=content['ap']['before'],
            layers=len(content['layers']),
            parameters=total['parameters_after'],
            GFLOPs=total['gflops_after'],
            flops=total['gflops_after'] / total['gflops_before'],
        )

    def _spend_as(self, seed: int, kind: str, mix: str, tell) -> Dict[str, float]:
        """Convert for what a mix takes, of time or of FLOPs."""
        if kind == 'time':
            share = self._measure(seed, 'times', list(MIXES), tell)[mix]
        else:
            share = self._convert_parts(seed, mix, tell)[kind]
        # Rounded up, so that the mix itself meets the budget.
        amount = min(1.0, math.ceil(1e4 * share - 1e-6) / 1e4)
        return self._spend(seed, kind, f'{amount:g}', tell)

    def _spend(self, seed: int, kind: str, amount: str, tell) -> Dict[str, float]:
        """Convert for an amount, and measure the time of what that gives."""
        name = f'{kind}={amount}'
        found = self._convert_to(seed, name, ['--budget', name], tell)
        return dict(found, time=self._measure(seed, f'times_{name}', [name], tell)[name])

    def _measure(self, seed: int, name: str, folders: Sequence[str], tell) -> Dict[str, float]:
        """Measure the time of converted detectors over the teacher's, in turns."""
        path = self._of(seed) / f'{name}.json'
        if not path.is_file():
            tell('measuring')
            torch.set_num_threads(self._threads)
            teacher = load_detector(Config.fromfile(self.config), self._teachers_checkpoint(seed))
            files = find_images(teacher.cfg)
            image = load_images(teacher, teacher.cfg, files, 2, seed)[:1]
            models = [teacher]
            for folder in folders:
                checkpoint = converted_checkpoint(self._of(seed) / folder, self.config)
                config = Config.fromfile(checkpoint.with_suffix('.py'))
                models.append(load_detector(config, checkpoint))
            runs = [partial(run_stages, model, stages_of(model), image) for model in models]
            before, *after = alternate(runs, 'cpu', ROUNDS)
            shares = {folder: seconds / before for folder, seconds in zip(folders, after)}
            write_whole(path, json.dumps(shares, indent=2).encode())
        return json.loads(path.read_text())


def _name(seed: int, what: str, kind: str = '') -> str:
    return f'seed {seed}, {f"budget of {kind} for " if kind else ""}{what}'


def _describe(result: Mapping[str, float]) -> str:
    if 'AP' not in result:
        return ', '.join(f'{label} {share:.3f}' for label, share in result.items())
    time = f', time {result["time"]:.3f}' if 'time' in result else ''
    return f'AP {result["AP"]:.1f}, {result["layers"]} layers{time}'


def as_markdown(results: Mapping[str, Any], seeds: Sequence[int], kinds: Sequence[str]) -> str:
    """Format the tables: for each mix its own numbers and those of the budget, means over the teachers.

    Args:
        results: By the steps' names.
        seeds: Of the teachers.
        kinds: Of budgets.
    """
    text = ''
    for kind in kinds:
        rows = []
        for mix in (*MIXES, LEAST):
            pairs = [
                (_mix_of(results, seed, mix), results[_name(seed, mix, kind)])
                for seed in seeds
                if _name(seed, mix, kind) in results
            ]
            if pairs:
                rows.append(
                    _row(mix, kind, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
                )
        titles = (
            'parts', 'teachers', 'their AP', 'time', 'GFLOPs', 'M parameters', 'AP', 'budget: time', 'GFLOPs',
            'M parameters', 'AP', 'more AP than the parts', 'at least as good',
        )  # fmt: skip
        text += f'Budgets of {kind}:\n\n{format_table(titles, rows)}\n\n'
    return f"{text}Times are shares of the teacher's. AP is without training.\n"


def _mix_of(results: Mapping[str, Any], seed: int, mix: str) -> Optional[dict]:
    """Give a mix's numbers with its time; None for what is no mix."""
    if mix == LEAST:
        return None
    return dict(results[_name(seed, mix)], time=results[_name(seed, 'times')][mix])


def _row(mix: str, kind: str, mixes: List[Optional[dict]], budgets: List[dict]) -> List[str]:
    before = as_mean([each['AP_before'] for each in budgets])
    if mixes[0] is None:
        return [mix, str(len(budgets)), before, *4 * ['–'], *_cells(budgets), '–', '–']
    more = [budget['AP'] - each['AP'] for each, budget in zip(mixes, budgets)]
    # A mix that is slower than the teacher is compared with a budget of the teacher's time.
    wanted = statistics.fmean(min(1.0, each[kind]) for each in mixes)
    taken = statistics.fmean(each[kind] for each in budgets)
    return [
        mix, str(len(budgets)), before, *_cells(mixes), *_cells(budgets), as_mean(more, sign='+'),
        judge(more, taken / wanted),
    ]  # fmt: skip


def _cells(found: Sequence[Mapping[str, float]]) -> List[str]:
    return [
        as_mean([each['time'] for each in found], 3),
        as_mean([each['GFLOPs'] for each in found], 3),
        as_mean([each['parameters'] / 1e6 for each in found], 3),
        as_mean([each['AP'] for each in found]),
    ]


def judge(more: Sequence[float], taken: float) -> str:
    """Say whether budgets are at least as good as a mix.

    Args:
        more: AP that a budget has more than the mix, for each teacher.
        taken: What the budgets took, of what they were to take.

    Examples:
        >>> judge([0.5, 0.1], 1.0), judge([-0.2, 0.1], 1.0), judge([-0.5, -0.4], 1.0), judge([0.5, 0.1], 1.1)
        ('yes', 'within the error', 'no', 'no: 1.10 of the budget')
    """
    if taken > 1 + TOLERANCE:
        return f'no: {taken:.2f} of the budget'
    mean = statistics.fmean(more)
    if mean >= 0:
        return 'yes'
    error = standard_error(more) if len(more) > 1 else 0.0
    return 'within the error' if mean + error >= 0 else 'no'


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments instead of the command line's.

    Returns:
        The exit status.
    """
    parser = make_parser('budgets', __doc__)
    parser.add_argument(
        '--teachers', type=Path, required=True, help='folder of a study by tools.paper.conversions'
    )
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=['time'], help='of budgets')
    options, convert = parse(parser, argv)

    def make_plan() -> Plan:
        return Study(
            options.teachers, options.work_dir, options.kinds, options.threads, convert
        ).plan()

    return run_study('budgets', options, make_plan)


if __name__ == '__main__':
    sys.exit(main())
