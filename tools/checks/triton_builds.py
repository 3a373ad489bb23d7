#!/usr/bin/env python
"""Compile the Triton kernels ahead of time, and read registers, spills and shared memory from the result.

    python -m tools.checks.triton_builds                                      all that is promised
    python -m tools.checks.triton_builds --types bfloat16 --depths 32 --windows 3 7 13 31

It takes no GPU: Triton brings NVIDIA's assembler. Every kernel is compiled with the very arguments that
attention would launch it with. By default maps are channels_last, heads share relative positions, logits are
q.k + q.r and the border is zeros. Each variant changes what it is named after. Ends with status 1 if a kernel
spills registers to memory. Likewise if it needs more shared memory than the GPU has, so that it could not be
launched. Up to 32 bytes per thread do not count as a spill. The assembler chooses to spill that much to stay
within 80, 128 or 168 registers, so that one more program fits on a multiprocessor.
"""

import argparse
import sys
from contextlib import contextmanager
from itertools import product

import torch
import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sasa_det.ops.backends import triton_kernels
from sasa_det.ops.backends.triton_launches import backward_launches, forward_launch
from sasa_det.ops.window import Window, empty_output

from ..paper.markdown import format_table
from . import sass

# Bytes of shared memory that one program may take, CUDA C++ Programming Guide, technical specifications.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
TOLERATED = 32
POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
# Every option that changes the compiled kernels.
VARIANTS = {
    'plain': {},
    'per_head': dict(positions='per_head'),
    'no positions': dict(positions=None),
    'qr': dict(key=False),
    'mask': dict(border='mask'),
    'mask, qr, per_head': dict(border='mask', key=False, positions='per_head'),
    'mask, no positions': dict(border='mask', positions=None),
    'dilated': dict(dilation=2),
    'contiguous': dict(channels_last=False),
    '64 bits': dict(size=(20000, 20000)),
    '64 bits, contiguous': dict(size=(20000, 20000), channels_last=False),
    'tf32': dict(tf32=True),
}


def launches(
    dtype, depth, window, *, positions='shared', key=True, border='zeros', dilation=1,
    channels_last=True, size=(40, 56), tf32=False,
) -> list:  # fmt: skip
    """List the launches of a forward and a backward, on maps without memory.

    Args:
        dtype: Type of all tensors.
        depth: Channels per head.
        window: Window size k.
        positions: 'shared', 'per_head' or None.
        key: Whether there are keys.
        border: 'zeros' or 'mask'.
        dilation: Dilation of the window.
        channels_last: Whether maps are slices of a channels_last map, else of a contiguous one.
        size: Size of the map.
        tf32: The value of torch.backends.cuda.matmul.allow_tf32.
    """
    heads = 2

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device='meta')

    layout = torch.channels_last if channels_last else torch.contiguous_format
    fused = empty(1, 3 * heads * depth, *size).contiguous(memory_format=layout)
    q, k, v = fused.chunk(3, 1)
    o, do, dq, dk, dv = (empty_output(q) for _ in range(5))
    if not key:
        k = dk = None
    logsumexp = torch.empty(1, heads, *size, device='meta')
    row = col = partials = None
    if positions:
        row, col = empty(2, 1 if positions == 'shared' else heads, depth // 2, window)
        partials = torch.empty(1, device='meta')
    options = Window(window, heads, dilation=dilation, border=border)
    with multiply_by_tf32(tf32):
        return [
            forward_launch(q, k, v, row, col, o, logsumexp, options),
            *backward_launches(do, q, k, v, row, col, logsumexp, dq, dk, dv, partials, options),
        ]


@contextmanager
def multiply_by_tf32(wanted: bool):
    """Set the precision of float32 matrix products inside of the context."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def compile_launch(launch, capability: int):
    """Compile a kernel as Triton would at its launch.

    Args:
        launch: The arguments of its launch.
        capability: Compute capability, ten times the number that NVIDIA gives.

    Returns:
        What Triton compiled.
    """
    kernel = getattr(triton_kernels, launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[place,] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[place,] = [['tt.divisibility', 16]]
        else:
            signature[parameter.name] = 'i32' if value < 2**31 else 'i64'
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget('cuda', capability, 32),
        options={name: launch.arguments[name] for name in ('num_warps', 'num_stages')},
    )


def build(launch, capability: int) -> dict:
    """Compile a kernel, and read what it takes.

    Args:
        launch: The arguments of its launch.
        capability: Compute capability, ten times the number that NVIDIA gives.

    Returns:
        Registers per thread; spilled bytes per thread; bytes of shared memory.
    """
    compiled = compile_launch(launch, capability)
    usage = sass.disassemble(compiled.asm['cubin']).usage
    return dict(
        registers=usage['REG'],
        spilt=usage['STACK'] + usage['LOCAL'],
        shared=compiled.metadata.shared,
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--types', nargs='+', default=['bfloat16', 'float16', 'float32'])
    parser.add_argument('--depths', nargs='+', type=int, default=[8, 16, 32, 64])
    parser.add_argument('--windows', nargs='+', type=int, default=[7])
    parser.add_argument('--variants', nargs='+', default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument('--capabilities', nargs='+', type=int, default=[80, 90], choices=SHARED)
    options = parser.parse_args()
    cases = list(
        product(
            options.types, options.depths, options.windows, options.variants, options.capabilities
        )
    )
    titles = (
        'type', 'depth', 'window', 'variant', 'sm', 'kernel', 'tile', 'warps', 'registers',
        'spilt bytes', 'shared bytes',
    )  # fmt: skip
    rows, wrong = [], []
    for case in track(cases, description='Compiling', transient=True):
        dtype, depth, window, variant, capability = case
        for launch in launches(getattr(torch, dtype), depth, window, **VARIANTS[variant]):
            used = build(launch, capability)
            arguments = launch.arguments
            tile = f'{arguments["TILE_H"]} x {arguments["TILE_W"]}'
            name = launch.kernel.removesuffix('_kernel')
            rows.append((*case, name, tile, arguments['num_warps'], *used.values()))
            if used['spilt'] > TOLERATED or used['shared'] > SHARED[capability]:
                wrong.append(rows[-1])
    for table in filter(None, (rows, wrong)):
        print(format_table(titles, [[*map(str, row)] for row in table]), end='\n\n')
    print(f'{len(rows)} kernels, {len(wrong)} that spill or do not fit')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
