#!/usr/bin/env python
"""Compile the CUDA kernels ahead of time, and count instructions, registers and shared memory.

    python -m tools.checks.cuda_builds                                       all variants, for sm_80 and sm_90
    python -m tools.checks.cuda_builds --depths 32 --windows 7 --variants plain --architectures sm_90

It takes no GPU, but nvcc or NVRTC (`--compiler`), and two tools that come with Triton. Instructions are those
of the loop over chunks: a warp runs it once for 16 pixels of a head. Ends with status 1 if a kernel that a GPU
of that architecture can launch accesses local memory in this loop. Likewise if the kernels of the plain variant
for 32 channels a head, k = 7 and sm_90 exceed their limits.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from rich.progress import track

from sasa_det.ops.backends import cuda_driver
from sasa_det.ops.backends.cuda_launches import (
    DEPTHS,
    KERNELS,
    WINDOWS,
    Variant,
    cut,
    macros,
    shared_bytes,
    tile_of,
)
from sasa_det.ops.window import Window

from ..paper.markdown import format_table
from . import sass

# Bytes of shared memory that one block may take, CUDA C++ Programming Guide, technical specifications.
SHARED = {'sm_80': 163 << 10, 'sm_86': 99 << 10, 'sm_89': 99 << 10, 'sm_90': 227 << 10}
# Instructions in the loop, products among them, registers of a thread: 32 channels a head, k = 7, sm_90.
LIMITS = {
    'forward': (560, 68, 128),
    'backward_queries': (830, 110, 224),
    'backward_keys': (1000, 120, 184),
}
# Every option that changes the compiled kernels.
VARIANTS = {
    'plain': {},
    'no positions': dict(has_rel=False),
    'qr': dict(has_key=False),
    'mask': dict(masked=True),
    'mask, qr': dict(masked=True, has_key=False),
    'dilated': dict(dilated=True),
    'mask, dilated': dict(masked=True, dilated=True),
}


def missing(compiler: str = 'nvcc') -> str:
    """Say what is missing to compile and to count; empty if nothing is.

    Args:
        compiler: 'nvcc' or 'nvrtc'.
    """
    if compiler == 'nvcc' and shutil.which('nvcc') is None:
        return 'nvcc was not found'
    if compiler == 'nvrtc':
        try:
            cuda_driver.nvrtc()
        except OSError as error:
            return str(error)
    return sass.missing()


def compile_by_nvcc(kernel: str, variant: Variant, architecture: str) -> bytes:
    """Compile a kernel with nvcc.

    Args:
        kernel: Its name.
        variant: What it is compiled for.
        architecture: Such as 'sm_90'.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / 'kernel.cubin'
        defined = [f'-D{name}={value}' for name, value in macros(kernel, variant).items()]
        command = ['nvcc', '-std=c++17', '-cubin', f'-arch={architecture}', *defined]
        command += [str(cuda_driver.SOURCES / f'{kernel}.cu'), '-o', str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f'{kernel} for {variant}: {done.stderr}')
        return target.read_bytes()


def compile_by_nvrtc(kernel: str, variant: Variant, architecture: str) -> bytes:
    """Compile a kernel as the backend does.

    Args:
        kernel: Its name.
        variant: What it is compiled for.
        architecture: Such as 'sm_90'.
    """
    return cuda_driver.compile_kernel(kernel, cuda_driver.options_of(kernel, variant, architecture))


def count(code: bytes) -> dict:
    """Count what a kernel's loop over chunks takes.

    Args:
        code: A cubin.

    Returns:
        Instructions, products and accesses to local memory in the loop; registers of a thread.
    """
    found = sass.disassemble(code)
    loop = sass.loop_of_products(found)
    inside = found.names[loop.begin : loop.end + 1]
    return dict(
        instructions=len(inside),
        products=sum(map(sass.is_product, inside)),
        registers=found.usage['REG'],
        local=sum(name.startswith(('LDL', 'STL')) for name in inside),
    )


def traffic(kernel: str, variant: Variant, shape: tuple, window: Window) -> float:
    """Reckon the bytes that a kernel reads from and writes to the second-level cache, per pixel of a head.

    Args:
        kernel: Its name.
        variant: What it is compiled for.
        shape: (B, C, H, W) of the query.
        window: The attention's options, without dilation.
    """
    _, _, height, width = shape
    tile, radius = tile_of(variant.window), variant.window // 2
    pieces, length = cut(torch.empty(shape, device='meta'), window)[1:3]

    def inside(first: int, count: int, size: int) -> int:
        return max(min(first + count, size) - max(first, 0), 0)

    cols = sum(inside(left - radius, tile.pitch, width) for left in range(0, width, 16))
    rows = sum(
        inside(8 * piece * length - radius, 8 * (length + tile.chunks - 1), height)
        for piece in range(pieces)
    )
    loaded = rows * cols / (height * width)
    pixel = 2 * variant.depth
    if kernel == 'forward':
        return loaded * 2 * pixel + 2 * pixel + 4
    if kernel == 'backward_queries':
        partial = 4 * variant.depth * variant.window / (length * 8 * 16)
        return loaded * 2 * pixel + 3 * pixel + 8 + partial
    return loaded * (2 * pixel + 8) + 4 * pixel


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--types', nargs='+', default=['bfloat16', 'float16'])
    parser.add_argument('--depths', nargs='+', type=int, default=DEPTHS)
    parser.add_argument('--windows', nargs='+', type=int, default=WINDOWS)
    parser.add_argument('--variants', nargs='+', default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument('--architectures', nargs='+', default=['sm_80', 'sm_90'], choices=SHARED)
    parser.add_argument('--compiler', default='nvcc', choices=('nvcc', 'nvrtc'))
    options = parser.parse_args()
    why = missing(options.compiler)
    if why:
        parser.exit(2, f'{why}\n')
    compile_kernel = compile_by_nvcc if options.compiler == 'nvcc' else compile_by_nvrtc
    cases = product(
        options.types, options.depths, options.windows, options.variants, options.architectures
    )
    titles = (
        'type', 'depth', 'window', 'variant', 'architecture', 'kernel', 'instructions', 'products', 'registers',
        'local', 'shared bytes',
    )  # fmt: skip
    rows, wrong, large = [], [], 0
    for case in track([*cases], description='Compiling', transient=True):
        dtype, depth, window, name, architecture = case
        variant = Variant(getattr(torch, dtype), depth, window, **VARIANTS[name])
        # The backend refuses an input of which one kernel would not fit.
        if max(shared_bytes(kernel, variant) for kernel in KERNELS) > SHARED[architecture]:
            large += 1
            continue
        for kernel in KERNELS:
            found = count(compile_kernel(kernel, variant, architecture))
            rows.append((*case, kernel, *found.values(), shared_bytes(kernel, variant)))
            plain = (depth, window, name, architecture) == (32, 7, 'plain', 'sm_90')
            beyond = [value > most for value, most in zip(found.values(), LIMITS[kernel])]
            if found['local'] or (plain and any(beyond)):
                wrong.append(rows[-1])
    for table in filter(None, (rows, wrong)):
        print(format_table(titles, [[*map(str, row)] for row in table]), end='\n\n')
    print(f'{len(rows)} kernels, {len(wrong)} beyond a limit')
    print(f'{large} variants take more shared memory than there is')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
