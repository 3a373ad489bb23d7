"""What the studies of this folder share: steps that run one after the other, and go on after an interruption.

After each step, results.json and results.md are written. A step that fails is told, and the others go on. A
step finds by itself what it has done before. So the same command goes on after an interruption.
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
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from sasa_det.engine.work_dir_lock import hold_work_dir
from sasa_det.experiments.training_run import RunFailed
from sasa_det.files import write_whole

# A step that takes fewer seconds was done before.
SHORT = 5


class Step(NamedTuple):
    """One result of a study.

    Attributes:
        name: Unlike those of the others.
        epochs: How long it takes, about: as long as so many epochs of training.
        run: Gives the result, which JSON can hold; is told the progress.
        after: The name of the step that it needs, if any.
    """

    name: str
    epochs: float
    run: Callable[[Callable[[str], None]], Any]
    after: Optional[str] = None


class Plan(NamedTuple):
    """The steps of a study, and what becomes of their results.

    Attributes:
        steps: In the order in which they run.
        describe: Says a result in a few words.
        content: Of results.json, from the results by the steps' names.
        table: Of results.md, likewise.
    """

    steps: Sequence[Step]
    describe: Callable[[Any], str]
    content: Callable[[Dict[str, Any]], Any]
    table: Callable[[Dict[str, Any]], str]


class Clock:
    """Estimates the time left, from the epochs done so far in this process.

    Args:
        epochs: Those of all steps.
    """

    def __init__(self, epochs: float) -> None:
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


def run_steps(plan: Plan, folder: Path, tell: Callable[[str], None]) -> List[str]:
    """Run the steps of a study.

    Args:
        plan: Its steps.
        folder: Where results are written.
        tell: Called with lines that say how far it is.

    Returns:
        The failures, one text each.
    """
    clock = Clock(sum(step.epochs for step in plan.steps))
    results: Dict[str, Any] = {}
    failed = []
    for number, step in enumerate(plan.steps, 1):
        name = f'[{number} of {len(plan.steps)}] {step.name}'
        if step.after is not None and step.after not in results:
            tell(f'{name}: left out, as it needs: {step.after}')
            clock.finish(step.epochs, False)
            continue
        said = set()

        def say(text, name=name, said=said):
            epoch = re.match(r'epoch (\d+) of', text)
            if text not in said:
                said.add(text)
                tell(f'{name}: {text}; {clock.left(int(epoch[1]) - 1 if epoch else 0)}')

        begin = time.monotonic()
        try:
            results[step.name] = step.run(say)
            tell(f'{name}: {plan.describe(results[step.name])}')
        except (RunFailed, OSError, ValueError, KeyError) as error:
            failed.append(f'{name}: {error}')
            tell(f'{name}: FAILED, {error}')
        clock.finish(step.epochs, time.monotonic() - begin > SHORT)
        content = json.dumps(plan.content(results), indent=2) + '\n'
        write_whole(folder / 'results.json', content.encode())
        write_whole(folder / 'results.md', plan.table(results).encode())
    return failed


def run_command(arguments: Sequence[str], output: Path) -> None:
    """Run a command of ``sasa-det``.

    Args:
        arguments: Of it.
        output: A file that its output is added to.

    Raises:
        RunFailed: It failed; says how the output ends.
    """
    with output.open('a') as file:
        done = subprocess.run(
            [sys.executable, '-m', 'sasa_det', *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        tail = '\n'.join(output.read_text(errors='replace').splitlines()[-15:])
        raise RunFailed(f'{arguments[0]} failed with {done.returncode}; {output} ends in\n{tail}')


def claim(folder: Path, settings: dict) -> None:
    """Note the settings of a study in its folder.

    Args:
        folder: The folder; made if missing.
        settings: What all of its results depend on.

    Raises:
        ValueError: The folder holds a study with other settings.
    """
    text = json.dumps(settings)
    path = folder / 'settings.json'
    if path.is_file() and path.read_text() != text:
        raise ValueError(f'work_dir {folder} holds results with other settings; name another one')
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Make a study's parser, with the options that all have.

    Args:
        name: The study's module.
        description: Of what it does.
    """
    parser = argparse.ArgumentParser(
        prog=f'python -m tools.paper.{name}',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--threads', type=int, default=1, help='of each step (default: 1)')
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Optional[Sequence[str]]
) -> Tuple[argparse.Namespace, List[str]]:
    """Read a command line, of which what follows ``--`` is for another command.

    Args:
        parser: The study's.
        argv: Arguments instead of the command line's.

    Returns:
        What is the study's, and what is not.

    Examples:
        >>> parse(make_parser('tried', ''), ['--work-dir', 'here', '--', '--heads', '4'])[1]
        ['--heads', '4']
    """
    given = list(sys.argv[1:] if argv is None else argv)
    place = given.index('--') if '--' in given else len(given)
    return parser.parse_args(given[:place]), given[place + 1 :]


def run_study(name: str, options: argparse.Namespace, make_plan: Callable[[], Plan]) -> int:
    """Run a study from the command line.

    Args:
        name: The study's module.
        options: What :func:`make_parser` reads.
        make_plan: Gives its steps.

    Returns:
        The exit status: 1 if a step failed.
    """
    # Batch systems stop a job by SIGTERM; it is treated as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ['OMP_NUM_THREADS'] = str(options.threads)
    try:
        plan = make_plan()
        hold_work_dir(options.work_dir)
        failed = run_steps(plan, options.work_dir, partial(print, flush=True))
    except KeyboardInterrupt:
        print('Interrupted. The same command goes on from the last checkpoint.', file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f'{name}: {error}', file=sys.stderr)
        return 2
    print((options.work_dir / 'results.md').read_text(), end='')
    for failure in failed:
        print(f'{name}: FAILED, {failure}', file=sys.stderr)
    return 1 if failed else 0
