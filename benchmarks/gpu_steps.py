#!/usr/bin/env python
"""The parts of benchmarks/gpu_run.sh that no other program has. Each is a process of its own.

    python -m benchmarks.gpu_steps numerics    compare every kernel with the reference in float64
    python -m benchmarks.gpu_steps kernels     the time of each kernel of a forward and a backward at P3
    python -m benchmarks.gpu_steps small       one forward and backward per backend, for a sanitizer

`--dry-run` runs them on the CPU on small maps, with the Triton kernels under TRITON_INTERPRET=1. Needs torch
and Triton.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

from sasa_det.ops import available_backends, local_attention

from .measuring import Gpu, Rehearsal, as_markdown, write
from .subjects import SHAPES

BACKENDS = ('triton', 'cuda')
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest norm of an error, relative to the norm of the exact result on the same rounded inputs.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OPTIONS = (
    dict(kernel_size=7),
    dict(kernel_size=3, border='mask'),
    dict(kernel_size=5, dilation=2),
    dict(kernel_size=7, positions='per head'),
    dict(kernel_size=7, positions='none'),
    dict(kernel_size=7, key=False),
)
NUMERICS_TITLES = {
    'backend': '{backend}',
    'type': '{dtype}',
    'options': '{options}',
    'largest error': '{error:.1e}',
    'of': '{of}',
    'within': '{within}',
}
KERNELS_TITLES = {
    'backend': '{backend}',
    'batch': '{batch}',
    'kernel': '{kernel}',
    'calls': '{calls}',
    'microseconds per call': '{us:.1f}',
}
NAMES = ('query', 'key', 'value', 'rel_row', 'rel_col')


def find_backends() -> dict:
    """Say of each backend why it is not measured; None if it is."""
    found = available_backends()
    return {name: found.get(name, 'this version has no such backend') for name in BACKENDS}


def make_inputs(
    on: Gpu, size: tuple, dtype: torch.dtype, kernel_size: int, positions='shared', key=True
) -> list:
    """Draw query, key, value and relative positions; None for what is not there."""
    generator = torch.Generator(on.device).manual_seed(0)
    tables = on.num_heads if positions == 'per head' else 1

    def draw(shape):
        x = torch.randn(shape, generator=generator, device=on.device).to(dtype)
        x = x.contiguous(memory_format=on.layout) if x.dim() == 4 else x
        return x.requires_grad_()

    maps = [draw(size), draw(size) if key else None, draw(size)]
    shape = (tables, size[1] // on.num_heads // 2, kernel_size)
    return maps + ([None, None] if positions == 'none' else [draw(shape), draw(shape)])


def attend(on: Gpu, inputs: list, backend: str, **options) -> list:
    """Compute the output and the gradients of all inputs."""
    output = local_attention(*inputs, **options, num_heads=on.num_heads, backend=backend)
    present = [x for x in inputs if x is not None]
    return [output, *torch.autograd.grad(output.square().sum(), present)]


def numerics(on: Gpu, out: Path) -> int:
    """Compare every kernel's results with the reference's; return how many deviate."""
    rows, size = [], on.size(2, (128, 13, 21))
    for backend, reason in find_backends().items():
        if reason is not None:
            print(f'not measured: {backend}: {reason}')
            continue
        for dtype in DTYPES:
            if backend == 'cuda' and dtype == torch.float32:
                continue  # left to Triton
            for options in OPTIONS if on.device == 'cuda' else OPTIONS[:1]:
                attention = {k: v for k, v in options.items() if k not in ('positions', 'key')}
                others = {k: v for k, v in options.items() if k in ('positions', 'key')}
                inputs = make_inputs(on, size, dtype, options['kernel_size'], **others)
                exact = [
                    None if x is None else x.detach().cpu().double().requires_grad_()
                    for x in inputs
                ]
                names = ['output', *(n for n, x in zip(NAMES, inputs) if x is not None)]
                try:
                    results = attend(on, inputs, backend, **attention)
                except RuntimeError as error:
                    if 'cannot be used' not in str(error):
                        raise
                    print(f'not measured: {backend} in {dtype} with {options}: {error}')
                    continue
                expected = attend(on, exact, 'reference', **attention)
                errors = [
                    ((a.cpu().double() - b).norm() / b.norm()).item()
                    for a, b in zip(results, expected)
                ]
                # NaN compares as larger than nothing, so it must be looked for.
                worst = max(errors, key=lambda x: float('inf') if x != x else x)
                rows.append(
                    dict(
                        backend=backend, dtype=str(dtype).split('.')[1], options=json.dumps(options),
                        error=worst, of=names[errors.index(worst)], within=worst < TOLERANCE[dtype],
                    )
                )  # fmt: skip
    report(on, out / 'numerics', NUMERICS_TITLES, rows)
    return sum(not row['within'] for row in rows)


def kernels(on: Gpu, out: Path) -> int:
    """Time each kernel of a forward and a backward by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    gpu = on.device == 'cuda'
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    rows = []
    for batch in (1, 16) if gpu else (1,):
        inputs = make_inputs(on, on.size(batch, SHAPES['P3']), on.dtype, on.kernel_size)
        for backend, reason in find_backends().items():
            if reason is not None:
                print(f'not measured: {backend}: {reason}')
                continue
            run = partial(attend, on, inputs, backend, kernel_size=on.kernel_size)
            if gpu:
                run()  # compiles
            with profile(activities=[activity]) as profiler:
                for _ in range(10 if gpu else 1):
                    run()
            for event in profiler.key_averages():
                total = event.self_device_time_total if gpu else event.self_cpu_time_total
                if total > 0:
                    rows.append(
                        dict(backend=backend, batch=batch, kernel=event.key[:60], calls=event.count,
                             us=total / event.count)
                    )  # fmt: skip
    report(on, out / 'kernels', KERNELS_TITLES, sorted(rows, key=lambda x: -x['us']))
    return 0


def small(on: Gpu, out: Path) -> int:
    """Run one forward and backward per backend on a map of some tiles."""
    inputs = make_inputs(on, on.size(1, (256, 9, 10)), on.dtype, on.kernel_size)
    for backend, reason in find_backends().items():
        if reason is None:
            results = attend(on, inputs, backend, kernel_size=on.kernel_size)
            assert all(x.isfinite().all() for x in results), backend
        print(f'{backend}: {reason or "ran"}')
    return 0


def report(on: Gpu, path: Path, titles: dict, rows: list) -> None:
    """Write rows as JSON and Markdown, and print them."""
    markdown = as_markdown(on.describe(), titles, rows)
    write(path, on.describe(), rows, markdown)
    print(markdown)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = dict(numerics=numerics, kernels=kernels, small=small)
    parser.add_argument('step', choices=steps)
    parser.add_argument('--out', type=Path, default=Path('gpu_results'), help='a folder')
    parser.add_argument('--dry-run', action='store_true')
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        print('This measures an NVIDIA GPU, and torch finds none here.', file=sys.stderr)
        sys.exit(2)
    failed = steps[options.step](Rehearsal() if options.dry_run else Gpu(), options.out)
    if failed:
        sys.exit(f'{failed} results deviate too much from the reference')


if __name__ == '__main__':
    main()
