#!/usr/bin/env python
"""Time local attention on a GPU against the convolution that it replaces, and against its peers.

    python -m benchmarks.attention_gpu                    all of it, in eight minutes at most
    python -m benchmarks.attention_gpu --shapes P3 P4 --batches 1 --detectors

In bfloat16 and channels_last, at the shapes of RetinaNet-R50 for 1333 x 800, a 7 x 7 window against cuDNN's
3x3 convolution. Before anything is timed, every subject's result and gradients are compared with the
reference's in float32 on a small map. Subjects take turns, round by round; times are medians by the GPU's
own events, from cold caches, and ratios are of them. `bytes` counts each input and output tensor once.
Shares are relative to a matrix product's FLOP/s and a copy's bytes/s, measured in the same run. `peak MB` is
what a forward and backward allocate at most beside their inputs. `host ms` is Python's time to queue a call.
Small maps take that long, unless the GPU is still busy.

Subjects: `conv3x3`, the convolution. `core`, the operator alone, by the Triton kernels. `core-cuda`, the
same by the CUDA kernels. `layer`, the operator with its projections. At P3 also `flex`, torch's
flex_attention, compiled, with the terms q.r as its score_mod. `eager`, the operator in tiled PyTorch.
`unfold`, the reference, by unfolded windows. Then a training iteration of RetinaNet-R50, attention in all
parts against convolutions, under bfloat16 autocast.
What fails or is not reached in time is listed, and the rest measured. Writes OUT.json and OUT.md.
`--dry-run` runs the same code on the CPU, at small sizes, and measures nothing.
"""

import argparse
import logging
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from .measuring import Gpu, Rehearsal, as_markdown, take_turns, write
from .subjects import SHAPES, Subject, as_row

SUBJECTS = ('conv3x3', 'core', 'core-cuda', 'layer', 'flex', 'eager', 'unfold')
# These compile for half a minute, or take up to a hundred times as long as the others.
ONLY_AT_P3 = ('flex', 'eager', 'unfold')
SMALL = (2, (128, 13, 21))  # batch and shape of the maps that results are compared on
TITLES = {
    'shape': '{shape}',
    'batch': '{batch}',
    'subject': '{subject}',
    'forward ms': '{forward_ms:.3f}',
    '/ conv': '{forward_ratio:.2f}',
    'fwd+bwd ms': '{both_ms:.3f}',
    '/ conv ': '{both_ratio:.2f}',
    'host ms': '{forward_host_ms:.2f}, {both_host_ms:.2f}',
    'TFLOP/s': '{forward_tflops:.1f}, {both_tflops:.1f}',
    'share': '{forward_share:.0%}, {both_share:.0%}',
    'GB/s': '{forward_gbytes:.0f}, {both_gbytes:.0f}',
    'share ': '{forward_copy_share:.0%}, {both_copy_share:.0%}',
    'peak MB': '{peak_mb:.0f}',
    '/ conv  ': '{peak_ratio:.2f}',
}
DETECTOR_TITLES = {
    'config': '{config}',
    'batch': '{batch}',
    'training ms': '{train_ms:.1f}',
    '/ first': '{train_ratio:.2f}',
    'peak MB': '{train_mb:.0f}',
    '/ first ': '{train_mb_ratio:.2f}',
}


def new_subject(on: Gpu, name: str, size: tuple) -> Subject:
    """Make a subject of the type and layout that are measured."""
    return Subject(name, size, on.kernel_size, on.device, on.dtype, on.layout)


class Report:
    """The measurements so far, and the missing ones with their reasons.

    Args:
        out: OUT of OUT.json and OUT.md, written after each case.
        machine: Its description.
        minutes: Time after which no further case begins.
        on: The GPU.
    """

    def __init__(self, out: Path, machine: dict, minutes: float, on: Gpu) -> None:
        self.out = out
        self.on = on
        self.machine = machine
        self.end = time.monotonic() + 60 * minutes
        self.rows, self.detectors, self.missing = [], [], []

    def attempt(self, what: str, call):
        """Return a call's result; None, with a line in the report, if it fails or comes too late."""
        if time.monotonic() > self.end:
            self.missing.append(dict(not_measured=what, why='the time was up'))
            return None
        try:
            result = call()
            self.on.forget()
            return result
        except Exception as error:  # of a compiler, of the GPU's memory, of a missing package
            why = f'{type(error).__name__}: {error}'.splitlines()[0]
            self.missing.append(dict(not_measured=what, why=why))
            return None

    def markdown(self) -> str:
        """Format the results as text."""
        parts = [as_markdown(self.machine, TITLES, self.rows)]
        if self.detectors:
            parts.append(as_markdown({}, DETECTOR_TITLES, self.detectors))
        parts += [f'- not measured: {x["not_measured"]}: {x["why"]}\n' for x in self.missing]
        return '\n'.join(parts)

    def write(self) -> None:
        """Write the results so far."""
        rows = self.rows + self.detectors + self.missing
        write(self.out, self.machine, rows, self.markdown())


def time_attention(report: Report, names: list, shape: str, batch: int) -> None:
    """Time all subjects at a shape."""
    on = report.on
    case = (shape, batch, on.kernel_size)
    size = on.size(batch, SHAPES[shape])
    subjects, memory = {}, {}

    def prepare(name):
        subject = new_subject(on, name, size)
        subject.both()  # compiles, and makes one-time allocations
        return subject, on.peak_growth(subject.both)

    for name in names:
        made = report.attempt(f'{name} at {shape}, batch {batch}', partial(prepare, name))
        if made is not None:
            subjects[name], memory[name] = made
    if 'conv3x3' not in subjects:
        return
    calls = {name: dict(forward=x.forward, both=x.both) for name, x in subjects.items()}
    measured = report.attempt(
        f'{shape}, batch {batch}',
        lambda: [
            take_turns(calls, seconds=1, least=min(3, on.rounds), clock=each, most=on.rounds)
            for each in (on.clock, on.host_clock)
        ],
    )
    if measured is None:
        return
    times, host_times = measured
    for name in times:
        row = as_row(case, name, size, times, report.machine)
        for way, count in zip(('forward', 'both'), subjects[name].traffic()):
            row[f'{way}_tflops'] = row[f'{way}_gflops'] / 1e3
            row[f'{way}_gbytes'] = count / times[name][way] / 1e9
            row[f'{way}_host_ms'] = 1e3 * host_times[name][way]
            row[f'{way}_copy_share'] = row[f'{way}_gbytes'] / report.machine['copy_gb_per_s']
        row['peak_mb'] = memory[name] / 2**20
        row['peak_ratio'] = memory[name] / memory['conv3x3']
        report.rows.append(row)


def time_detectors(report: Report, batch: int) -> None:
    """Time training iterations, the detectors in turns, and measure their peak memory."""
    on = report.on
    detectors, memory = {}, {}

    def prepare(name):
        from .detector import Detector, make_batch

        detector = Detector(name, make_batch(*on.images(batch)), on.device)
        detector.train()  # compiles, and allocates the momentum
        return detector, on.peak_growth(detector.train)

    for name in on.detectors:
        made = report.attempt(f'{name}, batch {batch}', partial(prepare, name))
        if made is None:
            return
        detectors[name], memory[name] = made
    times = report.attempt(
        f'detectors, batch {batch}',
        lambda: take_turns(
            {name: dict(train=detector.train) for name, detector in detectors.items()},
            seconds=0, least=min(8, on.rounds), clock=on.clock,
        ),
    )  # fmt: skip
    first = on.detectors[0]
    for name in times or ():
        seconds = times[name]['train']
        report.detectors.append(
            dict(
                config=name, batch=batch, train_ms=1e3 * seconds,
                train_ratio=seconds / times[first]['train'], train_mb=memory[name] / 2**20,
                train_mb_ratio=memory[name] / memory[first],
            )
        )  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    order = ['P3', *(shape for shape in SHAPES if shape != 'P3')]
    parser.add_argument('--shapes', nargs='*', default=order, choices=SHAPES)
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 16])
    parser.add_argument('--subjects', nargs='+', default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument('--detectors', nargs='*', type=int, default=[1, 16], metavar='BATCH')
    parser.add_argument(
        '--minutes', type=float, default=7, help='after which no case begins (%(default)s)'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/attention_gpu'))
    parser.add_argument(
        '--dry-run', action='store_true', help='run it on the CPU, small, to see that it runs'
    )
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        print('This measures an NVIDIA GPU, and torch finds none here.', file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)  # mmengine lists every weight that it initialises
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)

    on = Rehearsal() if options.dry_run else Gpu()
    report = Report(options.out, on.describe(), options.minutes, on)
    names = ['conv3x3'] if options.shapes else []
    for name in options.subjects if options.shapes else ():
        if name == 'conv3x3':
            continue
        if report.attempt(
            name, lambda name=name: new_subject(on, name, on.size(*SMALL)).check(0.05)
        ):
            names.append(name)
    cases = [
        (
            f'{shape}, batch {batch}',
            partial(
                time_attention, report,
                [name for name in names if shape == 'P3' or name not in ONLY_AT_P3], shape, batch,
            ),
        )
        for shape in options.shapes
        for batch in options.batches
    ]  # fmt: skip
    # P3 first, then the detectors, in case time runs out.
    place = len(options.batches)
    cases[place:place] = [
        (f'detectors, batch {batch}', partial(time_detectors, report, batch))
        for batch in options.detectors
    ]
    for what, case in cases:
        print(f'timing {what}', file=sys.stderr, flush=True)
        case()
        report.write()
    print(report.markdown())


if __name__ == '__main__':
    main()
