#!/usr/bin/env python
"""Time local attention on the CPU against the convolution that it replaces, and against its peers.

    python tools/benchmarks/attention.py                               P3, 7x7, batch 1
    python tools/benchmarks/attention.py --shapes all --kernel-sizes 3 5 7 9 11 --batches 1 4

Shapes are those of RetinaNet-R50 at 1333 x 800. Before anything is timed, every subject's result and
gradients are compared with the reference's on a small map. Subjects take turns, round by round, in
one process; figures are medians, and ratios are of them, against the 3x3 convolution.
Extra peak memory is measured in a process for each.

Subjects: `conv3x3`; `core`, the operator alone, by the C++ kernels; `layer`, with its projections;
`eager`, the operator in tiled PyTorch; `unfold`, the reference, which unfolds k x k windows and takes
matrix products over them; `public unfold`, the formula arranged as public implementations do, copies of
keys and values for every window multiplied number by number; `compiled`, torch.compile of that, only
where it is asked for, since it compiles for minutes. Writes OUT.json and OUT.md.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import as_markdown, describe_machine, in_own_process, peak_growth, take_turns, write
from rich.progress import Progress
from torch import nn

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import local_attention
from sasa_det.ops.library import count_macs

SHAPES = {  # channels, height, width
    'stage 1': (64, 200, 336),
    'stage 2': (128, 100, 168),
    'stage 3': (256, 50, 84),
    'stage 4': (512, 25, 42),
    'P3': (256, 100, 168),
    'P4': (256, 50, 84),
    'P5': (256, 25, 42),
    'P6': (256, 13, 21),
    'P7': (256, 7, 11),
}
HEADS = 8
BACKENDS = {'core': 'native', 'eager': 'eager', 'unfold': 'reference'}
SUBJECTS = ('conv3x3', 'core', 'layer', 'eager', 'unfold', 'public unfold', 'compiled')
TITLES = {
    'shape': '{shape}',
    'batch': '{batch}',
    'k': '{kernel_size}',
    'subject': '{subject}',
    'forward ms': '{forward_ms:.2f}',
    '/ conv': '{forward_ratio:.2f}',
    'fwd+bwd ms': '{both_ms:.2f}',
    '/ conv ': '{both_ratio:.2f}',
    'GFLOP/s': '{forward_gflops:.0f}, {both_gflops:.0f}',
    'share of peak': '{forward_share:.0%}, {both_share:.0%}',
    'extra MB': '{extra_mb:.0f}',
}


def unfold_as_published(query, key, value, rel_row, rel_col, kernel_size):
    """Attend with whole windows of keys and values in memory.

    So do the public implementations of the paper; but they apply the softmax to each product, and this
    to their sum over a head's channels, which is the formula.
    """
    batch, channels, height, width = query.shape

    def windows(x):
        padded = F.pad(x, (kernel_size // 2,) * 4)
        return padded.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1)

    by_head = (batch, HEADS, channels // HEADS, height, width, -1)
    window = (-1, -1, kernel_size, kernel_size)
    positions = torch.cat(
        (rel_row.unsqueeze(3).expand(window), rel_col.unsqueeze(2).expand(window)), 1
    )
    positions = positions.repeat(HEADS, 1, 1, 1).view(channels, 1, 1, kernel_size, kernel_size)
    keys = (windows(key) + positions).contiguous().view(by_head)
    values = windows(value).contiguous().view(by_head)
    weights = (query.view(by_head) * keys).sum(2, keepdim=True).softmax(-1)
    return (weights * values).sum(-1).view_as(query)


class Subject:
    """Something to time: a function of leaves that need gradients.

    Args:
        name: One of SUBJECTS.
        shape: (B, C, H, W).
        kernel_size: Of the attention.
    """

    def __init__(self, name: str, shape: tuple, kernel_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        channels = shape[1]
        if name not in ('conv3x3', 'layer'):
            sizes = [shape] * 3 + [(1, channels // HEADS // 2, kernel_size)] * 2
            self.leaves = [torch.randn(size, generator=generator) for size in sizes]
            if name in BACKENDS:
                self.call = lambda *leaves: local_attention(
                    *leaves, kernel_size=kernel_size, num_heads=HEADS, backend=BACKENDS[name]
                )
            else:
                published = unfold_as_published
                if name == 'compiled':
                    published = torch.compile(published, dynamic=False)
                self.call = lambda *leaves: published(*leaves, kernel_size)
        else:
            module = (
                nn.Conv2d(channels, channels, 3, padding=1, bias=False)
                if name == 'conv3x3'
                else LocalSelfAttention2d(channels, kernel_size=kernel_size, num_heads=HEADS)
            )
            x = torch.randn(shape, generator=generator)
            self.leaves = [x, *(parameter.detach() for parameter in module.parameters())]
            names = [name for name, _ in module.named_parameters()]
            self.call = lambda x, *parameters: torch.func.functional_call(
                module, dict(zip(names, parameters)), x
            )
        for leaf in self.leaves:
            leaf.requires_grad_()
        # The output's gradient exists before the backward, as it does in training.
        self.grad = torch.randn(shape, generator=generator)

    def forward(self) -> torch.Tensor:
        """Compute without keeping anything for a backward."""
        with torch.no_grad():
            return self.call(*self.leaves)

    def both(self) -> tuple:
        """Compute the gradients of all leaves."""
        return torch.autograd.grad(self.call(*self.leaves), self.leaves, self.grad)


def check_correctness(names, kernel_sizes) -> None:
    """Raise an AssertionError unless every way of computing attention gives the reference's numbers."""
    for kernel_size in kernel_sizes:
        expected = Subject('unfold', (2, 32, 13, 21), kernel_size)
        for name in names:
            if name in ('conv3x3', 'layer'):
                continue
            subject = Subject(name, (2, 32, 13, 21), kernel_size)
            for result, truth in zip(
                (subject.forward(), *subject.both()), (expected.forward(), *expected.both())
            ):
                torch.testing.assert_close(result, truth, rtol=1e-3, atol=1e-4)


def flops(name: str, shape: tuple, kernel_size: int) -> tuple:
    """Count the FLOPs of a forward, and of it and its backward; a multiply-add counts as two."""
    batch, channels, height, width = shape
    pixels = batch * height * width
    if name == 'conv3x3':
        macs = 9 * channels**2 * pixels
        return 2 * macs, 6 * macs
    core = count_macs(shape, kernel_size, True, True)
    projections = 3 * channels**2 * pixels if name == 'layer' else 0
    # The backward projects and computes the logits again, and two products for each of the forward's.
    again = core * 3 - count_macs(shape, kernel_size, False, False)
    return 2 * (core + projections), 2 * (core + again + 4 * projections)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--shapes', nargs='+', default=['P3'], choices=[*SHAPES, 'all'])
    parser.add_argument('--kernel-sizes', nargs='+', type=int, default=[7])
    parser.add_argument('--batches', nargs='+', type=int, default=[1])
    parser.add_argument('--subjects', nargs='+', default=SUBJECTS[:-1], choices=SUBJECTS)
    parser.add_argument('--threads', type=int, help="default: torch's")
    parser.add_argument('--seconds', type=float, default=5, help='for each subject (%(default)s)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/attention'))
    parser.add_argument('--memory-of', metavar='SUBJECT', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ['conv3x3', *(name for name in options.subjects if name != 'conv3x3')]
    cases = [
        (shape, batch, kernel_size)
        for shape in (SHAPES if 'all' in options.shapes else options.shapes)
        for batch in options.batches
        for kernel_size in options.kernel_sizes
    ]
    if options.memory_of:
        shape, batch, kernel_size = cases[0]
        shape = (batch, *SHAPES[shape])
        # Loads its libraries; what is compiled is so for one shape.
        warm = shape if options.memory_of == 'compiled' else (1, shape[1], 8, 8)
        Subject(options.memory_of, warm, kernel_size).both()
        print(peak_growth(Subject(options.memory_of, shape, kernel_size).both))
        return

    check_correctness(names, options.kernel_sizes)
    machine = describe_machine()
    rows = []
    with Progress(transient=True, refresh_per_second=1) as progress:
        for case in progress.track(cases, description='Timing'):
            shape = (case[1], *SHAPES[case[0]])
            subjects = {each: Subject(each, shape, case[2]) for each in names}
            times = take_turns(
                {each: dict(forward=x.forward, both=x.both) for each, x in subjects.items()},
                options.seconds,
            )
            del subjects
            for each in names:
                row = dict(zip(('shape', 'batch', 'kernel_size'), case), subject=each)
                for way, count in zip(('forward', 'both'), flops(each, shape, case[2])):
                    seconds = times[each][way]
                    row[f'{way}_ms'] = seconds * 1e3
                    row[f'{way}_ratio'] = seconds / times['conv3x3'][way]
                    row[f'{way}_gflops'] = count / seconds / 1e9
                    row[f'{way}_share'] = count / seconds / 1e9 / machine['peak_gflops']
                row['extra_mb'] = (
                    in_own_process(
                        '--memory-of', each, '--shapes', case[0], '--batches', case[1],
                        '--kernel-sizes', case[2], '--threads', torch.get_num_threads(),
                    )
                    / 2**20
                )  # fmt: skip
                rows.append(row)
            write(options.out, machine, rows, as_markdown(machine, TITLES, rows))
    print(as_markdown(machine, TITLES, rows))


if __name__ == '__main__':
    main()
