"""How the benchmarks measure: the machine, time in alternating turns, memory in separate processes."""

import argparse
import ctypes
import json
import logging
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Hashable, List, Optional

import torch


def prepare(threads: Optional[int] = None) -> None:
    """Silence what is not about the measurement, and set torch's number of threads.

    Args:
        threads: The number; None leaves it.
    """
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)  # mmengine lists every weight that it initialises
    if threads:
        torch.set_num_threads(threads)


def describe_machine() -> dict:
    """Describe the CPU: processor, threads, versions, FLOP/s of multiply-adds, bytes/s of a copy.

    Raises:
        FileNotFoundError: There is no C++ compiler; CXX may name it.
        subprocess.CalledProcessError: It does not compile fma_peak.cpp.
    """
    processor = platform.processor()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next((x.split(':')[1].strip() for x in lines if 'model name' in x), processor)
    return dict(
        processor=processor,
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        peak_gflops=round(_multiply_adds() / 1e9, 1),
        copy_gb_per_s=round(_copy() / 1e9, 1),
    )


def describe_gpu() -> dict:
    """Describe the GPU: name, versions, FLOP/s of a bfloat16 matrix product, bytes/s of a copy."""
    import triton

    gpu = torch.cuda.get_device_properties(0)
    clock = by_device_events()
    a = torch.randn(2**13, 2**13, device='cuda', dtype=torch.bfloat16)
    source, target = torch.empty(2, 2**28, device='cuda').unbind()
    return dict(
        gpu=gpu.name,
        capability=f'{gpu.major}.{gpu.minor}',
        multiprocessors=gpu.multi_processor_count,
        memory_gib=round(gpu.total_memory / 2**30),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        triton=triton.__version__,
        peak_gflops=round(2 * 2**39 / min(clock(lambda: a @ a) for _ in range(20)) / 1e9),
        copy_gb_per_s=round(
            2 * source.nbytes / min(clock(lambda: target.copy_(source)) for _ in range(20)) / 1e9
        ),
    )


def by_device_events() -> Callable:
    """Return a function that runs a callable and returns the seconds it took on the GPU.

    First it writes more than the caches hold, for some milliseconds. So the caches are as cold as inside of
    a network. Meanwhile the timed kernels are queued, so that the GPU does not wait for Python.
    """
    rubbish = torch.empty(2**30, dtype=torch.uint8, device='cuda')
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(call: Callable) -> float:
        for _ in range(16):
            rubbish.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def until_queued(call: Callable) -> float:
    """Call, and return the seconds that Python took to queue the work on the GPU."""
    torch.cuda.synchronize()
    return _seconds(call)


def gpu_peak_growth(call: Callable) -> int:
    """Call, and measure the peak growth of this process's GPU memory in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Gpu:
    """How and what is measured on a GPU: times by its own events, memory by torch's allocator."""

    device, dtype, layout = 'cuda', torch.bfloat16, torch.channels_last
    rounds = 30
    num_heads, kernel_size = 8, 7
    # The first is the one that the others are compared with.
    detectors = (
        'retinanet_r50_fpn_1x_coco',
        'retinanet_sasa-r50_sasa-fpn_sasa-head_1x_coco',
    )
    host_clock = staticmethod(until_queued)
    peak_growth = staticmethod(gpu_peak_growth)
    describe = staticmethod(describe_gpu)

    def __init__(self) -> None:
        self.clock = by_device_events()

    def size(self, batch: int, shape: tuple) -> tuple:
        """Give the (B, C, H, W) of a case."""
        return (batch, *shape)

    def images(self, batch: int) -> tuple:
        """Give the height, width and number of the images that a detector trains on."""
        return 800, 1333, batch

    def forget(self) -> None:
        """Give unused memory back."""
        torch.cuda.empty_cache()


class Rehearsal(Gpu):
    """The same steps on the CPU, on small maps: what goes wrong here would go wrong on the GPU. No figures."""

    device, dtype, layout = 'cpu', torch.float32, torch.channels_last
    rounds = 1
    # One tile, of which Triton's interpreter computes a few per second.
    num_heads, kernel_size = 1, 3
    detectors = ('retinanet_tiny_digits', 'retinanet_sasa-tiny_digits')

    def __init__(self) -> None:
        self.clock = self.host_clock = _seconds

    @staticmethod
    def peak_growth(call: Callable) -> int:
        """Call, and claim one byte."""
        call()
        return 1

    @staticmethod
    def describe() -> dict:
        """Say that this is none."""
        return dict(
            gpu='none, a rehearsal', torch=torch.__version__, peak_gflops=1, copy_gb_per_s=1
        )

    def size(self, batch: int, shape: tuple) -> tuple:
        """Give a size that takes no time."""
        return (1, 16, 2, 4)

    def images(self, batch: int) -> tuple:
        """Give one small image."""
        return 64, 96, 1

    def forget(self) -> None:
        """Nothing."""


def _multiply_adds() -> float:
    """Measure FLOP/s of multiply-adds on registers, on all of torch's threads: no kernel can exceed it.

    A matrix product would not do: torch's reaches half of this on some processors, its convolution more.
    """
    vector_bytes = {'AVX512': 64, 'AVX2': 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
    with TemporaryDirectory() as folder:
        library = Path(folder) / 'fma_peak.so'
        subprocess.run(
            [
                *shlex.split(os.environ.get('CXX', 'c++')), '-O3', '-march=native', '-shared', '-fPIC',
                f'-DVECTOR_BYTES={vector_bytes}', Path(__file__).with_name('fma_peak.cpp'), '-o', library,
            ],
            check=True,
        )  # fmt: skip
        multiply_add = ctypes.CDLL(str(library)).multiply_add
    multiply_add.restype = ctypes.c_double
    multiply_add.argtypes = (ctypes.c_long, *2 * [ctypes.c_float], ctypes.POINTER(ctypes.c_float))

    def run(_) -> float:
        return multiply_add(10**8, 0.5, 1.0, ctypes.c_float())

    # Python threads suffice, as ctypes releases the GIL. They run for a fifth of a second at a time, since
    # they may begin on one core.
    threads = range(torch.get_num_threads())
    with ThreadPoolExecutor(len(threads)) as pool:
        flop = sum(pool.map(run, threads))
        return flop / min(_seconds(lambda: list(pool.map(run, threads))) for _ in range(10))


def _copy() -> float:
    """Measure bytes/s, read plus written, of a copy too large for the caches."""
    a, b = torch.randn(2, 2**26).unbind()
    return 2 * a.nbytes / min(_seconds(lambda: b.copy_(a)) for _ in range(5))


def _seconds(function: Callable) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def take_turns(
    subjects: Dict[Hashable, Dict[str, Callable]],
    seconds: float,
    least: int = 3,
    clock: Callable = _seconds,
    most: float = float('inf'),
    turn: float = 0,
) -> Dict[Hashable, Dict[str, float]]:
    """Time subjects round by round, so that changes in the machine's speed affect all of them.

    Args:
        subjects: The callables, by the subject's name, then by the measure's name.
        seconds: Time per subject, after which it leaves the rounds.
        least: Number of rounds that no subject leaves.
        clock: Runs a callable and returns the seconds it took.
        most: Number of rounds after which all leave.
        turn: Seconds for which a call is repeated in its turn. 0 for one call, which finds the caches as
            the others left them.

    Returns:
        Median seconds by the same names.
    """
    spent = dict.fromkeys(subjects, 0.0)
    times = {name: {measure: [] for measure in calls} for name, calls in subjects.items()}
    for calls in subjects.values():
        for call in calls.values():
            call()
    rounds = 0
    while rounds < least or (rounds < most and min(spent.values()) < seconds):
        for name, calls in subjects.items():
            if rounds >= least and spent[name] >= seconds:
                continue
            for measure, call in calls.items():
                passed = 0.0
                while True:
                    times[name][measure].append(clock(call))
                    passed += times[name][measure][-1]
                    if passed >= turn:
                        break
                spent[name] += passed
        rounds += 1
    return {
        name: {measure: statistics.median(values) for measure, values in measures.items()}
        for name, measures in times.items()
    }


def above_zero(number: type) -> Callable:
    """Give argparse a type of numbers above zero, of int or of float."""

    def parse(text: str):
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f'{text} is not above 0')
        return value

    parse.__name__ = number.__name__  # argparse's name for the type, in errors
    return parse


def peak_growth(call: Callable) -> int:
    """Call, and measure the peak growth of this process's resident memory in bytes."""
    Path('/proc/self/clear_refs').write_text('5')  # resets the peak to the current resident memory
    before = _status('VmRSS')
    call()
    return _status('VmHWM') - before


def _status(name: str) -> int:
    # getrusage's peak is unsuitable: a process inherits it from its parent.
    text = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(rf'{name}:\s*(\d+) kB', text)[1])


def in_own_process(*arguments) -> int:
    """Run the calling program with other arguments and return the number that it prints last."""
    # By module name, as with `python -m`: run as a file, it could not import its neighbours.
    program = ('-m', sys.modules['__main__'].__spec__.name)
    command = [sys.executable, *program, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def write(out: Path, machine: dict, rows: List[dict], markdown: str) -> None:
    """Write OUT.json and OUT.md, after each case, so that Ctrl-C loses none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix('.json').write_text(
        json.dumps(dict(machine=machine, rows=rows), indent=2) + '\n'
    )
    out.with_suffix('.md').write_text(markdown)


def as_markdown(machine: dict, titles: Dict[str, str], rows: List[dict]) -> str:
    """Format rows as a table.

    Args:
        machine: Its description, printed above the table.
        titles: Per column, its title and the format of its cells.
        rows: The rows, one line each.
    """
    lines = [
        ', '.join(f'{key} {value}' for key, value in machine.items()),
        '',
        f'| {" | ".join(titles)} |',
        '|---' * len(titles) + '|',
    ]
    lines += [f'| {" | ".join(titles.values())} |'.format(**row) for row in rows]
    return '\n'.join(lines) + '\n'
