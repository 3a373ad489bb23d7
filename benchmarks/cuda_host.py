#!/usr/bin/env python
"""Measure the time that the CPU takes to queue a layer on a GPU, without a GPU: from Python, and in C++.

    python -m benchmarks.cuda_host

A library stands in the place of the driver, whose functions return at once. The maps are of a few pixels, on
the CPU. So the projections, which PyTorch computes there, cost mostly their calls; "convolution" is those calls
alone. Python's launches are those of installations without the C++ library. Turns alternate in one process;
figures are medians. Writes OUT.json and OUT.md.
"""

import argparse
import ctypes
import os
import shlex
import subprocess
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Callable, Dict

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa_det.layers import LocalSelfAttention2d, projected_attention
from sasa_det.ops.backends import cuda, cuda_driver
from sasa_det.ops.backends.cuda_launches import shared_bytes
from sasa_det.ops.native_library import load

from .measuring import above_zero, as_markdown, take_turns, write

TITLES = {
    'computes in': '{precision}',
    'of': '{measure}',
    'convolution us': '{convolution:.0f}',
    'from Python us': '{python:.0f}',
    'in C++ us': '{native:.0f}',
    'C++ / Python': '{ratio:.2f}',
    'without convolutions': '{bare:.2f}',
}
CHANNELS, HEADS = 64, 8


def stub_driver() -> ctypes.CDLL:
    """Compile and load the functions that stand in for the driver's."""
    with TemporaryDirectory() as folder:
        library = Path(folder) / 'stub_driver.so'
        source = Path(__file__).with_name('stub_driver.cpp')
        compiler = shlex.split(os.environ.get('CXX', 'c++'))
        subprocess.run([*compiler, '-O2', '-shared', '-fPIC', source, '-o', library], check=True)
        return ctypes.CDLL(str(library))


def pretend(driver: ctypes.CDLL) -> Callable[[bool], None]:
    """Have CPU tensors take a GPU's way, as far as the driver.

    Args:
        driver: The functions in its place.

    Returns:
        A function that has all launches made in C++, or from Python.
    """
    library, reason = load()
    if library is None:
        raise SystemExit(f'native: {reason}')
    functions = [getattr(driver, name) for name in cuda_driver._FUNCTIONS]
    library.cuda_connect([*functions, driver.stream_handle])
    cuda.missing = lambda: None
    cuda.refuse = lambda query, window: None
    cuda_driver.driver = lambda: driver
    cuda_driver._load_kernel = lambda device, kernel, variant: cuda_driver._Loaded(
        1, shared_bytes(kernel, variant), 1
    )
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    on_gpu = projected_attention._ON_GPU

    def choose(native: bool) -> None:
        library.cuda_forget()
        cuda_driver._loaded.clear()
        cuda_driver.connected = lambda: native
        projected_attention._ON_GPU = on_gpu if native else None

    return choose


def convolve(x: Tensor, weight: Tensor, backward: bool) -> None:
    """Call the convolutions of a layer: one forward; for a backward, one more and its gradients."""
    y = F.conv2d(x, weight)
    if backward:
        y = F.conv2d(x, weight)
        torch.ops.aten.convolution_backward(
            y, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )


def step(layer: LocalSelfAttention2d, x: Tensor, backward: bool, autocast: bool) -> None:
    """Run a layer as a step of training does, or its forward alone."""
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast), torch.set_grad_enabled(backward):
        y = layer(x)
    if backward:
        y.backward(y.detach())


def measure(precision: str, backward: bool, choose: Callable, options) -> Dict[str, float]:
    """Time a layer in both ways, in turns.

    Args:
        precision: 'bfloat16', or 'autocast' for float32 weights under autocast.
        backward: Whether the backward follows.
        choose: From `pretend`.
        options: Of the command line.

    Returns:
        Microseconds.
    """
    layer = LocalSelfAttention2d(CHANNELS, num_heads=HEADS, backend='cuda')
    layer = layer if precision == 'autocast' else layer.bfloat16()
    x = torch.randn(1, CHANNELS, 2, 3, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(3 * CHANNELS, CHANNELS, 1, 1, dtype=torch.bfloat16)
    run = partial(step, layer, x, backward, precision == 'autocast')
    clocks = {'python': False, 'native': True}
    times = {name: [] for name in (*clocks, 'convolution')}
    for _ in range(options.rounds):
        for name, native in clocks.items():
            choose(native)
            run()  # loads
            run()
            found = take_turns({name: dict(us=run)}, 0, least=options.repeats)
            times[name].append(1e6 * found[name]['us'])
        with torch.no_grad():
            call = partial(convolve, x.detach(), weight, backward)
            found = take_turns(dict(convolution=dict(us=call)), 0, least=options.repeats)
        times['convolution'].append(1e6 * found['convolution']['us'])
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=above_zero(int), default=30, help='(%(default)s)')
    parser.add_argument(
        '--repeats', type=above_zero(int), default=50, help='calls in a turn (%(default)s)'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/cuda_host'))
    options = parser.parse_args()
    torch.set_num_threads(1)
    choose, rows = pretend(stub_driver()), []
    for precision in ('bfloat16', 'autocast'):
        for backward in (False, True):
            us = measure(precision, backward, choose, options)
            bare = (us['native'] - us['convolution']) / (us['python'] - us['convolution'])
            of = 'forward and backward' if backward else 'inference'
            ratio = us['native'] / us['python']
            rows.append(dict(precision=precision, measure=of, **us, ratio=ratio, bare=bare))
    capability = torch.backends.cpu.get_cpu_capability()
    machine = dict(capability=capability, cores=os.cpu_count(), torch=torch.__version__)
    markdown = as_markdown(machine, TITLES, rows)
    write(options.out, machine, rows, markdown)
    print(markdown)


if __name__ == '__main__':
    main()
