#!/usr/bin/env python
"""Time local attention on the CPU against the convolution that it replaces, and against its peers.

    python -m benchmarks.attention                               P3, 7x7, batch 1
    python -m benchmarks.attention --shapes all --kernel-sizes 3 5 7 9 11 --batches 1 4

Shapes are those of RetinaNet-R50 at 1333 x 800, and P2, four times P3, which RetinaNet has not. Before
anything is timed, every subject's result and gradients are compared with the reference's on a small map.
Subjects, and numbers of threads where there are several, take turns, round by round, in one process; with
--together so do shapes, windows and batches. Figures are medians, and ratios are of them, against the 3x3
convolution by as many threads. Extra peak memory is measured in a process for each. A turn is one call, which
finds the caches as other subjects left them. With --turn it is as many calls as take so long; most of them
find the caches as the same subject left them.

Subjects: `conv3x3`, the convolution. `core`, the operator alone, by the C++ kernels. `layer`, the
operator with its projections. `eager`, the operator in tiled PyTorch. `unfold`, the reference, by
matrix products over unfolded k x k windows. `public unfold`, the formula as in public implementations:
copies of keys and values per window, multiplied element by element. `compiled`, torch.compile of that,
only on request, since it compiles for minutes. Writes OUT.json and OUT.md.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Callable

import torch
from rich.progress import Progress

from .measuring import (
    above_zero,
    as_markdown,
    describe_machine,
    in_own_process,
    peak_growth,
    take_turns,
    write,
)
from .subjects import SHAPES, Subject, as_row

SUBJECTS = ('conv3x3', 'core', 'layer', 'eager', 'unfold', 'public unfold', 'compiled')
SIZES = {**SHAPES, 'P2': (256, 200, 336)}
TITLES = {
    'shape': '{shape}',
    'batch': '{batch}',
    'k': '{kernel_size}',
    'threads': '{threads}',
    'subject': '{subject}',
    'forward ms': '{forward_ms:.2f}',
    '/ conv': '{forward_ratio:.2f}',
    'fwd+bwd ms': '{both_ms:.2f}',
    '/ conv ': '{both_ratio:.2f}',
    'us a pixel': '{forward_us:.2f}, {both_us:.2f}',
    'GFLOP/s': '{forward_gflops:.0f}, {both_gflops:.0f}',
    'share of peak': '{forward_share:.0%}, {both_share:.0%}',
    'extra MB': '{extra_mb:.0f}',
}


def by_threads(threads: int, call: Callable) -> None:
    """Call with a number of torch threads."""
    torch.set_num_threads(threads)
    call()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--shapes', nargs='+', default=['P3'], choices=[*SIZES, 'all'], help='all: but P2'
    )
    parser.add_argument('--kernel-sizes', nargs='+', type=int, default=[7])
    parser.add_argument('--batches', nargs='+', type=above_zero(int), default=[1])
    parser.add_argument('--subjects', nargs='+', default=SUBJECTS[:-1], choices=SUBJECTS)
    parser.add_argument(
        '--threads',
        nargs='+',
        type=above_zero(int),
        default=[torch.get_num_threads()],
        help="default: torch's",
    )
    parser.add_argument(
        '--seconds', type=above_zero(float), default=5, help='for each subject (%(default)s)'
    )
    parser.add_argument(
        '--turn', type=float, default=0, metavar='SECONDS', help='default: one call'
    )
    parser.add_argument('--together', action='store_true', help='all cases take turns too')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/attention'))
    parser.add_argument('--memory-of', metavar='SUBJECT', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not all(size > 0 and size % 2 for size in options.kernel_sizes):
        parser.error(f'--kernel-sizes {options.kernel_sizes}: all must be odd and positive')
    if options.turn < 0:
        parser.error(f'--turn {options.turn}: must not be below 0')
    torch.set_num_threads(options.threads[0])
    names = ['conv3x3', *(name for name in options.subjects if name != 'conv3x3')]
    cases = [
        (shape, batch, kernel_size)
        for shape in (SHAPES if 'all' in options.shapes else options.shapes)
        for batch in options.batches
        for kernel_size in options.kernel_sizes
    ]
    if options.memory_of:
        shape, batch, kernel_size = cases[0]
        shape = (batch, *SIZES[shape])
        # Loads its libraries; compiled code is for one shape.
        warm = shape if options.memory_of == 'compiled' else (1, shape[1], 8, 8)
        Subject(options.memory_of, warm, kernel_size).both()
        print(peak_growth(Subject(options.memory_of, shape, kernel_size).both))
        return

    for name, kernel_size in product(names, options.kernel_sizes):
        Subject(name, (2, 32, 13, 21), kernel_size).check(1e-5)
    machines = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        machines[threads] = describe_machine()
    machine = {
        key: values[0] if len(set(values)) == 1 else values
        for key, *values in zip(machines[threads], *(each.values() for each in machines.values()))
    }
    rows = []
    with Progress(transient=True, refresh_per_second=1) as progress:
        groups = [cases] if options.together else [[case] for case in cases]
        for group in progress.track(groups, description='Timing'):
            subjects = {
                (case, each): Subject(each, (case[1], *SIZES[case[0]]), case[2])
                for case, each in product(group, names)
            }
            times = take_turns(
                {
                    (threads, *key): dict(
                        forward=partial(by_threads, threads, x.forward),
                        both=partial(by_threads, threads, x.both),
                    )
                    for threads, (key, x) in product(options.threads, subjects.items())
                },
                options.seconds,
                turn=options.turn,
            )
            del subjects
            for case, threads, each in product(group, options.threads, names):
                own = {name: times[threads, case, name] for name in names}
                row = as_row(case, each, (case[1], *SIZES[case[0]]), own, machines[threads])
                row['threads'] = threads
                row['extra_mb'] = (
                    in_own_process(
                        '--memory-of', each, '--shapes', case[0], '--batches', case[1],
                        '--kernel-sizes', case[2], '--threads', threads,
                    )
                    / 2**20
                )  # fmt: skip
                rows.append(row)
            write(options.out, machine, rows, as_markdown(machine, TITLES, rows))
    print(as_markdown(machine, TITLES, rows))


if __name__ == '__main__':
    main()
