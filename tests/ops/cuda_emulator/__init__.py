"""The CUDA kernels on the CPU: their source, compiled by g++ with emulator.h in the place of a GPU."""

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from sasa_det.ops.backends import cuda, cuda_driver, cuda_launches

HERE = Path(__file__).resolve().parent
SOURCES = Path(cuda_driver.SOURCES)


class Range(ctypes.Structure):
    """Memory that a kernel may access."""

    _fields_ = [('begin', ctypes.c_void_p), ('end', ctypes.c_void_p), ('writable', ctypes.c_int)]


class EmulatorError(RuntimeError):
    """What a kernel did that it must not."""


@cache
def library(kernel, variant, change=None, optimise='-O1'):
    """Compile a kernel for the CPU and load it; `change` replaces a text of its source by another."""
    with tempfile.TemporaryDirectory() as folder:
        for path in SOURCES.iterdir():
            if path.suffix in ('.cu', '.cuh'):
                (Path(folder) / path.name).write_text(path.read_text())
        if change is not None:
            path = Path(folder) / f'{kernel}.cu'
            text = path.read_text()
            assert text.count(change[0]) == 1, change[0]
            path.write_text(text.replace(*change))
        target = Path(folder) / 'kernel.so'
        options = dict(KERNEL_FILE=f'"{kernel}.cu"', KERNEL_NAME=kernel)
        options.update(cuda_launches.macros(kernel, variant))
        command = [
            os.environ.get('CXX', 'g++'), optimise, '-std=c++17', '-shared', '-fPIC', '-w', '-U_FORTIFY_SOURCE',
            f'-I{folder}', f'-I{HERE}', *(f'-D{name}={value}' for name, value in options.items()),
            str(HERE / 'emulator.cpp'), '-o', str(target),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        run = ctypes.CDLL(str(target)).run
    run.argtypes = [
        ctypes.POINTER(cuda_launches.Arguments), ctypes.c_int, ctypes.c_ulonglong, ctypes.POINTER(Range),
        ctypes.c_int, ctypes.c_char_p, ctypes.c_int,
    ]  # fmt: skip
    return run


class Emulator:
    """Has the backend 'cuda' compute on the CPU, the threads in an order that is drawn; for monkeypatch.

    Attributes:
        seed: Of the order.
        change: A text in the forward's source and what to put there instead, to see that it matters.
    """

    def __init__(self, monkeypatch, seed=0, change=None):
        self.seed, self.change = seed, change
        monkeypatch.setattr(cuda, 'missing', lambda: None)
        monkeypatch.setattr(cuda, 'refuse', lambda query, window: None)
        monkeypatch.setattr(cuda_driver, 'run', lambda launch: run(launch, self.seed, self.change))


def run(launch, seed=0, change=None):
    """Run a launch, the threads in an order drawn from the seed."""
    ranges = [(x, False) for x in launch.reads] + [(x, True) for x in launch.writes]
    spans = [Range(*_span(x), writable) for x, writable in ranges]
    message = ctypes.create_string_buffer(400)
    change = change if launch.kernel == 'forward' else None
    failed = library(launch.kernel, launch.variant, change)(
        launch.arguments,
        launch.blocks,
        seed,
        (Range * len(spans))(*spans),
        len(spans),
        message,
        len(message),
    )
    if failed:
        raise EmulatorError(f'{launch.kernel}: {message.value.decode()}')


def _span(x):
    """Return the addresses of a tensor's first byte, and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
