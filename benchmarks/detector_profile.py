#!/usr/bin/env python
"""Tell what the time of a training iteration and of an inference goes into, on the CPU.

    python -m benchmarks.detector_profile              two RetinaNet-R50, 640 x 640, batch 1
    python -m benchmarks.detector_profile --size 320 --batch 4 --configs retinanet_sasa-tiny_bccd

The detectors and the batch are those of benchmarks.detector. Images are in memory: reading them takes no part.
torch.profiler times each operation; a forward operation and its backward are of one kind. The profiler makes
Python slower, so the shares mean more than the milliseconds. Figures are means of the iterations after the
first. Writes OUT.json and OUT.md.
"""

import argparse
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, Optional

import torch
from rich.progress import Progress
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile, record_function

from sasa_det.configs import find_config
from sasa_det.layers import AttentionStem, LocalSelfAttention2d

from .detector import Detector, make_batch
from .measuring import above_zero, as_markdown, describe_machine, prepare, write

CHOSEN = ['retinanet_r50_fpn_1x_coco', 'retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco']
OTHER, PYTHON = 'other operations', 'Python between operations'
# In the order of the table. By class of module, by method of the head, by the first letters of an event.
MODULES = {
    LocalSelfAttention2d: 'attention',
    AttentionStem: 'attention stem',
    nn.Conv2d: 'convolution',
    _BatchNorm: 'batch norm',
    nn.GroupNorm: 'group norm',
    nn.ReLU: 'ReLU',
}
METHODS = dict(loss_by_feat='targets and losses', predict_by_feat='decoding and NMS')
EVENTS = {
    'aten::upsample': 'upsampling',
    'aten::max_pool2d': 'pooling',
    'aten::avg_pool2d': 'pooling',
    'Optimizer.': 'gradients and optimizer',
    'autograd::engine::evaluate_function: torch::autograd::AccumulateGrad': 'gradients and optimizer',
}
# Elsewhere it is part of losses or of decoding.
SUM, SUMS = 'aten::add', 'residual and lateral sums'
PREPROCESSOR = 'normalisation of images'
KINDS = list(
    dict.fromkeys(
        [
            *MODULES.values(),
            SUMS,
            *EVENTS.values(),
            PREPROCESSOR,
            *METHODS.values(),
            OTHER,
            PYTHON,
        ]
    )
)
RANGE = 'kind: '
BACKWARD = 'autograd::engine::evaluate_function: '


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Have the profiler see which modules and methods of a detector are of which kind.

    Args:
        model: A detector with one stage.
    """
    hooks, head = [], model.bbox_head
    for module in model.modules():
        kind = next((kind for type_, kind in MODULES.items() if isinstance(module, type_)), None)
        if module is model.data_preprocessor:
            kind = PREPROCESSOR
        if kind is not None:
            hooks += _mark(module, kind)
    for name, kind in METHODS.items():
        setattr(head, name, record_function(RANGE + kind)(getattr(head, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in METHODS:
            delattr(head, name)


def _mark(module: nn.Module, kind: str) -> tuple:
    ranges = []

    def begin(*_):
        ranges.append(record_function(RANGE + kind))
        ranges[-1].__enter__()

    def end(*_):
        ranges.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(begin), module.register_forward_hook(end)


def time_by_kind(call: Callable, rounds: int) -> Dict[str, float]:
    """Profile a call.

    Args:
        call: Runs an iteration of a detector that is :func:`marked`.
        rounds: Number of calls, after one that is not profiled.

    Returns:
        Seconds per call, by kind.
    """
    call()
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            call()
        seconds = time.perf_counter() - begin
    events = profiler.events()
    kinds = _kinds_of_forwards(events)
    found = defaultdict(float)
    for event in events:
        found[_kind(event, kinds) or OTHER] += event.self_cpu_time_total / 1e6 / rounds
    found[PYTHON] = seconds / rounds - sum(found.values())
    return found


def _kinds_of_forwards(events) -> Dict[int, Optional[str]]:
    """Tell the kind of each operation that has a backward, by the number that both have."""
    forwards = (each for each in events if each.sequence_nr >= 0 and not _in_backward(each))
    # Operations without a backward have the number of the next one with it, which is the last.
    ordered = sorted(forwards, key=lambda each: each.time_range.start)
    return {each.sequence_nr: _kind(each, {}) for each in ordered}


def _in_backward(event) -> bool:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return True
        event = event.cpu_parent
    return False


def _kind(event, kinds_of_forwards: dict) -> Optional[str]:
    """Tell the kind of the innermost event around an event, itself included, that has one."""
    sums = False
    while event is not None:
        sums = sums or event.name.startswith(SUM)
        if event.name.startswith(RANGE):
            return event.name[len(RANGE) :]
        for begin, kind in EVENTS.items():
            if event.name.startswith(begin):
                return kind
        if event.name.startswith(BACKWARD):
            return kinds_of_forwards.get(event.sequence_nr)
        event = event.cpu_parent
    return SUMS if sums else None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--configs', nargs='+', default=CHOSEN, metavar='NAME', help='names or paths of configs'
    )
    parser.add_argument(
        '--size', type=above_zero(int), default=640, help='edge of the image in pixels'
    )
    parser.add_argument('--batch', type=above_zero(int), default=1)
    parser.add_argument('--threads', type=above_zero(int), help="default: torch's")
    parser.add_argument(
        '--rounds', type=above_zero(int), default=5, help='iterations of each (%(default)s)'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/detector_profile'))
    options = parser.parse_args()
    paths = [find_config(name) for name in options.configs]
    prepare(options.threads)
    torch.manual_seed(0)
    batch = make_batch(options.size, options.size, options.batch)
    machine = describe_machine()
    machine.update(size=options.size, batch=options.batch, rounds=options.rounds)
    found = {}
    with Progress() as progress:
        for path in progress.track(paths, description='Profiling'):
            detector = Detector(str(path), batch)
            with marked(detector.model):
                for way, call in (('training', detector.train), ('inference', detector.infer)):
                    found[f'{path.stem}, {way}'] = time_by_kind(call, options.rounds)
    rows = [
        dict(kind=kind, **{column: times[kind] for column, times in found.items()})
        for kind in KINDS
        if any(times.get(kind) for times in found.values())
    ]
    write(options.out, machine, rows, markdown := format_shares(machine, rows))
    print(markdown)


def format_shares(machine: dict, rows: list) -> str:
    """Format seconds as milliseconds and shares of each column.

    Args:
        machine: The description of the machine.
        rows: Seconds by column, and the kind.
    """
    columns = [name for name in rows[0] if name != 'kind']
    cells = []
    for row in rows:
        cells.append(dict(kind=row['kind']))
        for name in columns:
            share = row[name] / sum(each[name] for each in rows)
            cells[-1][name] = f'{1e3 * row[name]:.0f} ms, {share:.1%}'
    titles = {'kind': '{kind}', **{name: f'{{{name}}}' for name in columns}}
    return as_markdown(machine, titles, cells)


if __name__ == '__main__':
    main()
