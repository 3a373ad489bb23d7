#!/usr/bin/env python
"""Predict the GPU kernels' times from their instructions, without a GPU.

    python -m tools.checks.cuda_times

A model, no measurement: at RetinaNet's P3 (256 channels in 8 heads, 100 x 168 pixels, k = 7, bfloat16,
channels_last) in a batch of 16, on an H200. The kernels are compiled for sm_90, and their instructions are
counted. Each part of the GPU takes a time for its share of them, and the caches and the memory for theirs. No
part waits for another in the model, but they do not overlap in full either: the time is the cubic mean of the
parts' times. Triton's kernels were measured on an H200, so they show how far the model can be trusted.
"""

import argparse
import sys
from collections import Counter
from typing import Dict, NamedTuple

import torch

from sasa_det.ops.backends.cuda_launches import KERNELS, Variant, cut
from sasa_det.ops.window import Window

from ..paper.markdown import format_table
from . import cuda_builds, sass

SHAPE, KERNEL_SIZE, HEADS = (16, 256, 100, 168), 7, 8
CAPABILITY = 90
# H200: NVIDIA's data sheet, and for the memory a copy as measured by benchmarks/attention_gpu.py.
MULTIPROCESSORS, CLOCK, SCHEDULERS = 132, 1.83e9, 4
CACHE_BYTES, MEMORY_BYTES = 6.0e12, 4.264e12  # per second
# Cycles of a scheduler per instruction of a warp: a product of 16 x 8 x 16 by mma.sync, which does not reach
# the peak of wgmma; an exponential, of four lanes at a time; and logic at half of the rate.
PRODUCT_CYCLES, EXPONENTIAL_CYCLES, LOGIC_CYCLES = 6.3, 8, 2
LOGIC = (
    'FMNMX', 'SEL', 'FSEL', 'ISETP', 'FSETP', 'LOP3', 'IADD3', 'VIADD', 'LEA', 'SHF', 'PRMT', 'PLOP3', 'F2FP',
    'MOV', 'VIMNMX', 'SGXT', 'BMSK', 'IABS', 'P2R', 'R2P',
)  # fmt: skip
# Instructions of the pipe to shared and global memory, which the four schedulers share. It takes a cycle for
# every 128 bytes.
MEMORY = ('LDS', 'STS', 'SHFL', 'LDG', 'STG', 'MOVM')
WIDE = {'.64': 2, '.M88.2': 2, '.128': 4, '.M88.4': 4, '.MT88.4': 4}
# Seen on an H200, milliseconds: docs/performance.md.
MEASURED = {'forward': 0.458, 'backward': 2.202}


class Work(NamedTuple):
    """What a kernel does.

    Attributes:
        instructions: By name, of all warps together.
        cache_bytes, memory_bytes: Read and written.
    """

    instructions: Dict[str, float]
    cache_bytes: float
    memory_bytes: float


def predict(work: Work) -> Dict[str, float]:
    """Predict the time of a kernel.

    Args:
        work: What it does.

    Returns:
        Milliseconds of each part of the GPU alone, and of all as 'time'.

    Examples:
        >>> one = Work({'HMMA.16816.F32.BF16': 1e9}, 0, 0)
        >>> {part: round(ms, 3) for part, ms in predict(one).items() if ms}
        {'issue': 1.035, 'products': 6.52, 'time': 6.529}
    """
    cycles: Counter = Counter()
    for name, number in work.instructions.items():
        cycles['issue'] += number
        if sass.is_product(name):
            cycles['products'] += PRODUCT_CYCLES * number
        elif name.startswith('MUFU'):
            cycles['exponentials'] += EXPONENTIAL_CYCLES * number
        elif name.partition('.')[0] in LOGIC:
            cycles['logic'] += LOGIC_CYCLES * number
        elif name.startswith(MEMORY):
            width = next((many for suffix, many in WIDE.items() if name.endswith(suffix)), 1)
            cycles['shared memory'] += SCHEDULERS * width * number
    times = {part: each / (SCHEDULERS * MULTIPROCESSORS * CLOCK) for part, each in cycles.items()}
    times |= dict(cache=work.cache_bytes / CACHE_BYTES, memory=work.memory_bytes / MEMORY_BYTES)
    times['time'] = sum(seconds**3 for seconds in times.values()) ** (1 / 3)
    return {part: 1e3 * seconds for part, seconds in times.items()}


def cuda_work() -> Dict[str, Work]:
    """Compile the CUDA kernels, and find what they do."""
    window = Window(KERNEL_SIZE, HEADS)
    across = cut(torch.empty(SHAPE, device='meta'), window).across
    # Each has 16 pixels: a block's eight have eight rows of a strip.
    warps = SHAPE[0] * HEADS * across * -(-SHAPE[2] // 8) * 8
    work = {}
    for kernel in KERNELS:
        variant = Variant(torch.bfloat16, SHAPE[1] // HEADS, KERNEL_SIZE)
        code = sass.disassemble(cuda_builds.compile_by_nvcc(kernel, variant, f'sm_{CAPABILITY}'))
        loop = sass.loop_of_products(code)
        counts = Counter(code.names[loop.begin : loop.end + 1])
        work[kernel] = Work(
            {name: warps * number for name, number in counts.items()},
            _head_pixels() * cuda_builds.traffic(kernel, variant, SHAPE, window),
            _memory_bytes(kernel),
        )
    return work


def triton_work() -> Dict[str, Work]:
    """Compile the Triton kernels, and find what they do."""
    from . import triton_builds  # Triton is not everywhere

    size = SHAPE[2:]
    names = dict(zip(('forward_kernel', 'backward_dq_kernel', 'backward_dkdv_kernel'), KERNELS))
    work = {}
    # Of two heads of an image, whose tiles are as all others'.
    for launch in triton_builds.launches(torch.bfloat16, SHAPE[1] // HEADS, KERNEL_SIZE, size=size):
        kernel, arguments = names[launch.kernel], launch.arguments
        programs = launch.programs / 2 * SHAPE[0] * HEADS
        rows = arguments['TILE_H'] + KERNEL_SIZE - 1  # each is one turn of a loop
        tile, halo = arguments['BLOCK_M'], arguments['BLOCK_N']
        if kernel == 'backward_keys':
            tile, halo = arguments['TILE_H'] * arguments['TILE_W'], tile
        code = sass.disassemble(triton_builds.compile_launch(launch, CAPABILITY).asm['cubin'])
        pixel = 2 * SHAPE[1] // HEADS
        cache = {
            'forward': rows * halo * 2 * pixel + 2 * tile * pixel,
            # Twice over the window, and what it adds to the tables' gradients.
            'backward_queries': 2 * rows * halo * 2 * pixel + 3 * tile * pixel + _TABLES,
            'backward_keys': rows * halo * (2 * pixel + 8) + 4 * tile * pixel,
        }[kernel]
        memory = _memory_bytes(kernel) + (kernel == 'backward_queries') * programs * _TABLES
        counts = {name: programs * number for name, number in _turns(code, rows).items()}
        work[kernel] = Work(counts, programs * cache, memory)
    return work


# Bytes of one tile's part of the tables' gradients: float32, both tables.
_TABLES = 4 * 2 * SHAPE[1] // HEADS // 2 * KERNEL_SIZE


def _turns(code: sass.Code, turns: int) -> Counter:
    """Count instructions, those of loops as often as they are run."""
    counts = Counter(code.names)
    for loop in code.loops:
        if loop.end - loop.begin > 3:  # a kernel ends in a branch to itself
            for name in code.names[loop.begin : loop.end + 1]:
                counts[name] += turns - 1
    return counts


def _head_pixels() -> int:
    return SHAPE[0] * HEADS * SHAPE[2] * SHAPE[3]


def _memory_bytes(kernel: str) -> float:
    """Bytes of the maps that a kernel reads or writes, and of lse and delta."""
    maps, sums = {'forward': (4, 1), 'backward_queries': (5, 2), 'backward_keys': (6, 2)}[kernel]
    return _head_pixels() * (maps * 2 * SHAPE[1] // HEADS + sums * 4)


def total(times: Dict[str, Dict[str, float]]) -> Dict[str, float]:
    """Add the times of the kernels of a direction.

    Args:
        times: By kernel, what :func:`predict` gives.
    """
    return {
        direction: sum(each['time'] for name, each in times.items() if name.startswith(direction))
        for direction in MEASURED
    }


def as_markdown(backends: Dict[str, Dict[str, Dict[str, float]]]) -> str:
    """Format the tables: of directions, and of kernels with the parts' times.

    Args:
        backends: By backend and kernel, what :func:`predict` gives.
    """
    # Kernels have their parts in another order each.
    parts = list(next(iter(backends.values()))['forward'])
    directions, kernels = [], []
    for backend, times in backends.items():
        for direction, ms in total(times).items():
            measured = f'{MEASURED[direction]:.2f}' if backend == 'triton' else '–'
            directions.append((backend, direction, f'{ms:.2f}', measured))
        for kernel, each in times.items():
            kernels.append((backend, kernel, *(f'{each[part]:.3f}' for part in parts)))
    return (
        f'{format_table(("backend", "direction", "predicted ms", "measured ms"), directions)}\n\n'
        f'Milliseconds of the parts:\n\n{format_table(("backend", "kernel", *parts), kernels)}\n'
    )


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    why = cuda_builds.missing()
    if why:
        sys.exit(why)
    work = dict(triton=triton_work(), cuda=cuda_work())
    print(
        as_markdown(
            {
                backend: {kernel: predict(each) for kernel, each in kernels.items()}
                for backend, kernels in work.items()
            }
        ),
        end='',
    )


if __name__ == '__main__':
    main()
