#!/usr/bin/env python
"""Run mmdetection's own tests with SASAResNet, SASAFPN and SASARetinaHead in the place of its classes.

    python tools/checks/mmdet_tests.py DIR [TEST ...]

DIR is a checkout of mmdetection, of the version that is installed here. Nothing is fetched. For 3.3.0:

    git clone --branch v3.3.0 --depth 1 https://github.com/open-mmlab/mmdetection DIR

TEST are files or folders below its `tests/test_models`, by default those of ResNet, the necks, the dense heads
and the detectors. They need the package parameterized.

They run three times: as they are; with ours in place and no attention; with attention in all parts. Without
attention, what ours build must have the modules of mmdetection's classes and, in each bit, their weights. A
test that passes as it is must pass with ours, or the exit status is 1. What stays mmdetection's is listed. With
attention, a ResNet-18 or 34 becomes a SASAResNet of depth 26 or 38 with the same channels.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence
from xml.etree import ElementTree

from sasa_det.environment.stack import installed_version, is_fork

ROOT = Path(__file__).resolve().parents[2]
PARENT = 'tests/test_models'
TESTS = ('test_backbones/test_resnet.py', 'test_necks', 'test_dense_heads', 'test_detectors')
# Of each way to run the tests: the environment's variable that says it to the plugin, and its column.
WAY = 'SASA_MMDET_TESTS'
WAYS = {'': 'as they are', 'convolution': 'ours, no attention', 'attention': 'ours, attention'}
KERNEL_SIZE, NUM_HEADS = 7, 4
# SASAResNet has bottlenecks alone; their outputs have four times the channels.
BOTTLENECKS = {18: 26, 34: 38}

# --- The plugin: pytest imports this file in each of the three runs.

_BUILT: List[str] = []


def pytest_configure() -> None:
    """Put our classes in place, if this run is to have them."""
    way = os.environ[WAY]
    if way:
        put_in_place(way == 'attention')


def pytest_runtest_setup(item) -> None:
    """Note for each test what it builds of ours and of theirs."""
    _BUILT.clear()


def pytest_runtest_teardown(item) -> None:
    """Write down what the test has built."""
    item.user_properties += [(name, str(count)) for name, count in Counter(_BUILT).items()]


def put_in_place(attention: bool) -> None:
    """Have mmdet's registry and packages hold our classes under the names of its own.

    mmdet's subclasses of ResNet, FPN and RetinaHead stay as they are.

    Args:
        attention: Whether ours attend.
    """
    from mmdet.models import FPN, ResNet, RetinaHead
    from mmdet.registry import MODELS

    from sasa_det.models import SASAFPN, SASAResNet, SASARetinaHead

    for theirs, ours in ((ResNet, SASAResNet), (FPN, SASAFPN), (RetinaHead, SASARetinaHead)):
        build = in_place_of(theirs, ours, attention)
        MODELS.module_dict[theirs.__name__] = build
        # Not in the class's own file: its methods name the class.
        for package in ('', '.backbones', '.necks', '.dense_heads'):
            module = sys.modules[f'mmdet.models{package}']
            if hasattr(module, theirs.__name__):
                setattr(module, theirs.__name__, build)


def in_place_of(theirs: type, ours: type, attention: bool) -> Callable:
    """Make the function that builds a module of ours from the arguments of theirs.

    Args:
        theirs: mmdetection's class.
        ours: Our subclass of it.
        attention: Whether ours attend.
    """

    def build(*args, **kwargs):
        if attention and ours.__name__ == 'SASAResNet':
            args, kwargs = with_bottlenecks(*args, **kwargs)
        reason = why_theirs(ours, attention, *args, **kwargs)
        _BUILT.append(reason or ours.__name__)
        if reason:
            return theirs(*args, **kwargs)
        if attention:
            return ours(*args, attn_cfg=attention_for(**kwargs), **kwargs)
        return same_module(
            lambda: theirs(*copy.deepcopy(args), **copy.deepcopy(kwargs)),
            lambda: ours(*args, **kwargs),
        )

    return build


def with_bottlenecks(depth: int, base_channels: int = 64, **kwargs) -> tuple:
    """Give the arguments of the ResNet of bottlenecks whose outputs have the same channels.

    Args:
        depth: As mmdetection's ResNet takes it.
        base_channels: Likewise.
        kwargs: Its other arguments, which stay.
    """
    if depth in BOTTLENECKS:
        depth, base_channels = BOTTLENECKS[depth], base_channels // 4
    return (depth,), dict(base_channels=base_channels, **kwargs)


def why_theirs(ours: type, attention: bool, *args, **kwargs) -> Optional[str]:
    """Say why a module stays mmdetection's; None if it does not.

    Args:
        ours: Our class.
        attention: Whether ours attend.
        args, kwargs: The module's arguments.
    """
    depths = getattr(ours, 'arch_settings', None)
    if depths is not None and (args[0] if args else kwargs['depth']) not in depths:
        return 'ResNet of a depth that SASAResNet lacks'
    # A stage can attend or be deformable.
    return 'ResNet with deformable stages' if attention and kwargs.get('dcn') else None


def attention_for(base_channels: int = 64, **kwargs) -> dict:
    """Choose the attention for a module; some tests have ResNets of 1 to 4 channels."""
    if base_channels % (2 * NUM_HEADS):
        # Relative positions need an even number of channels per head.
        return dict(kernel_size=KERNEL_SIZE, num_heads=1, position='none')
    return dict(kernel_size=KERNEL_SIZE, num_heads=NUM_HEADS)


def same_module(theirs: Callable, ours: Callable):
    """Build a module in two ways from one state of the random numbers, and return the second.

    Args:
        theirs: Builds mmdetection's module.
        ours: Builds ours, without attention.

    Raises:
        AssertionError: They differ in a submodule, or in a bit of a weight.
    """
    import torch

    state = torch.get_rng_state()
    expected = theirs()
    torch.set_rng_state(state)
    module = ours()
    parts, known = ([type(each) for each in x.modules()][1:] for x in (module, expected))
    assert parts == known, f'{parts} instead of {known}'
    weights, known = module.state_dict(), expected.state_dict()
    assert weights.keys() == known.keys()
    assert all(torch.equal(weights[name], known[name]) for name in known)
    return module


# --- The command.


class Outcome(NamedTuple):
    """What became of a test.

    Attributes:
        passed: Whether it passed; None if it was skipped.
        built: How many modules it built, by class; for those that stayed mmdetection's, by reason.
        error: The message if it failed.
    """

    passed: Optional[bool]
    built: Dict[str, int]
    error: str


def run_tests(directory: Path, tests: Sequence[str], way: str, processes: int) -> dict:
    """Run tests of a checkout in one of the ways.

    Args:
        directory: The checkout.
        tests: Files and folders in it.
        way: One of `WAYS`.
        processes: Number of processes; above 1 they need pytest-xdist.

    Returns:
        For each test its :class:`Outcome`, by file, class and name.

    Raises:
        RuntimeError: pytest could not collect them.
    """
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get('PYTHONPATH', '')]
    environment = {**os.environ, WAY: way, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, 'report.xml')
        # Its own addopts need xdoctest. The checkout's mmdet is imported, as it is the working directory.
        command = [
            sys.executable, '-m', 'pytest', '-q', '-o', 'addopts=', '-o', 'junit_family=xunit1',
            '-p', 'no:cacheprovider', '-p', Path(__file__).stem, f'--junitxml={report}',
            *(['-n', str(processes)] if processes > 1 else []), *tests,
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=directory, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode not in (0, 1):
            raise RuntimeError(f'{" ".join(command)} failed with {done.returncode}:\n{done.stdout}')
        return dict(map(_outcome, ElementTree.parse(report).iter('testcase')))


def _outcome(case: ElementTree.Element) -> tuple:
    wrong = case.find('failure')
    wrong = case.find('error') if wrong is None else wrong
    passed = None if case.find('skipped') is not None else wrong is None
    built = {each.get('name'): int(each.get('value')) for each in case.iter('property')}
    error = '' if wrong is None else wrong.get('message').splitlines()[0]
    name = case.get('classname').rpartition('.')[2] + '::' + case.get('name')
    return (case.get('file'), name), Outcome(passed, built, error)


def as_markdown(outcomes: Dict[str, dict]) -> str:
    """Format the outcomes as a table, one row per file in which a test builds a module of ours.

    Args:
        outcomes: What :func:`run_tests` returned for each of `WAYS`.
    """
    before = outcomes['']
    passed = [test for test in before if before[test].passed]
    lines = [['file', 'tests that build ours', *WAYS.values()]]
    lines.append(['---'] * len(lines[0]))
    ours = [test for test in passed if _builds_ours(outcomes['attention'].get(test))]
    groups = {file: [test for test in ours if test[0] == file] for file, _ in ours}
    groups['all'] = ours
    groups['other tests'] = [test for test in passed if test not in ours]
    for name, tests in groups.items():
        counts = (sum(bool(of[test].passed) for test in tests) for of in outcomes.values())
        number = 0 if name == 'other tests' else len(tests)
        name = name.replace(f'{PARENT}/', '')
        lines.append([name, str(number), *(f'{count} of {len(tests)}' for count in counts)])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _builds_ours(outcome: Optional[Outcome]) -> bool:
    return outcome is not None and any(name.startswith('SASA') for name in outcome.built)


def failures(outcomes: Dict[str, dict]) -> List[str]:
    """List the tests that pass as they are and not with ours, each with its message.

    Args:
        outcomes: As in :func:`as_markdown`.
    """
    return [
        f'{WAYS[way]}: {file}: {name}: {of[file, name].error or "skipped"}'
        for way, of in outcomes.items()
        for file, name in of
        if outcomes[''][file, name].passed and not of[file, name].passed
    ]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the tests three times and print the table.

    Returns:
        1 if a test fails with ours, 2 for wrong arguments, else 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directory', type=Path, metavar='DIR')
    parser.add_argument('tests', nargs='*', default=TESTS, metavar='TEST')
    parser.add_argument('--processes', type=int, default=1, help='needs pytest-xdist if above 1')
    options = parser.parse_args(argv)
    wrong = why_not(options.directory, options.tests)
    if wrong:
        parser.error(wrong)
    tests = [f'{PARENT}/{test}' for test in options.tests]
    outcomes = {
        way: run_tests(options.directory.resolve(), tests, way, options.processes) for way in WAYS
    }
    print(as_markdown(outcomes))
    kinds = Counter(outcome.passed for outcome in outcomes[''].values())
    print(f'\nWithout ours {kinds[False]} fail and {kinds[None]} are skipped: not in the table.')
    for way in ('convolution', 'attention'):
        built = sum((Counter(outcome.built) for outcome in outcomes[way].values()), Counter())
        print(
            f'Built, {WAYS[way]}: {", ".join(f"{n} {name}" for name, n in sorted(built.items()))}.'
        )
    found = failures(outcomes)
    print('\n'.join(found))
    return 1 if found else 0


def why_not(directory: Path, tests: Sequence[str]) -> Optional[str]:
    """Say why the tests cannot run; None if they can.

    Args:
        directory: The checkout.
        tests: Files and folders below its tests/test_models.
    """
    file = directory / 'mmdet/version.py'
    if not file.is_file():
        return f'DIR must be a checkout of mmdetection, but {file} does not exist'
    package = 'onedl-mmdetection' if is_fork() else 'mmdet'
    version = installed_version(package)
    # The fork's asks for the version of what is installed.
    stated = f"version('{package}')" if is_fork() else f"'{version}'"
    if f'__version__ = {stated}' not in file.read_text():
        return f'DIR must be of the installed version, {version}, but {file} has another'
    for test in tests:
        if not (directory / PARENT / test).exists():
            return f'TEST must be in {directory / PARENT}, but {test} is not'
    if find_spec('parameterized') is None:
        return f'its tests need parameterized: {sys.executable} -m pip install parameterized'
    return None


if __name__ == '__main__':
    sys.exit(main())
