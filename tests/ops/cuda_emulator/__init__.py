"""The CUDA kernels on the CPU: their source, compiled by g++ with emulator.h in the place of a GPU."""

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from sasa_det.ops.backends import cuda, cuda_driver, cuda_launches
from sasa_det.ops.native_library import load

HERE = Path(__file__).resolve().parent
SOURCES = Path(cuda_driver.SOURCES)


class Range(ctypes.Structure):
    """Memory that a kernel may access."""

    _fields_ = [('begin', ctypes.c_void_p), ('end', ctypes.c_void_p), ('writable', ctypes.c_int)]


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


# The driver's functions, in the order of csrc/gpu.cpp.
FUNCTIONS = (
    ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, *7 * [ctypes.c_uint], ctypes.c_void_p,
        ctypes.POINTER(ctypes.POINTER(cuda_launches.Arguments)), ctypes.c_void_p,
    ),
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)),
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p),
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)),
    ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p),
)  # fmt: skip


class StubDriver:
    """Stands in the place of libcuda, for CPU tensors: records launches, and runs nothing.

    Attributes:
        launches: What was launched: kernel, variant, number of blocks and a copy of the arguments.
        settings: Of each launch: blocks, threads, bytes of shared memory, stream and current context.
        contexts: What was made current.
        context: The current context. That of the kernels is CONTEXT.
        capturing: Whether the stream is being captured.
        failing: The status that launches return, and what the driver says of it.
    """

    CONTEXT, STREAM = 5, 7

    def __init__(self, monkeypatch, library):
        self.launches, self.settings, self.contexts = [], [], []
        self.context, self.capturing, self.failing = None, False, (0, b'')
        self._handles = {}
        monkeypatch.setattr(cuda, 'missing', lambda: None)
        monkeypatch.setattr(cuda, 'refuse', lambda query, window: None)
        monkeypatch.setattr(cuda_driver, 'connected', lambda: True)
        monkeypatch.setattr(cuda_driver, '_loaded', {})
        monkeypatch.setattr(cuda_driver, '_load_kernel', self._load)
        library.cuda_forget()
        stubs = (
            self._launch, self._get_context, self._set_context, self._say, self._is_capturing, self._handle,
        )  # fmt: skip
        library.cuda_connect([function(stub) for function, stub in zip(FUNCTIONS, stubs)])

    def run(self, kernel, variant, blocks, arguments):
        """Do nothing; returns the driver's status."""
        return self.failing[0]

    def _load(self, device, kernel, variant):
        handle = 1 + len(self._handles)
        self._handles[handle] = kernel, variant
        shared = cuda_launches.shared_bytes(kernel, variant)
        return cuda_driver._Loaded(handle, shared, self.CONTEXT)

    def _launch(self, function, x, y, z, threads, ty, tz, shared, stream, parameters, extra):
        kernel, variant = self._handles[function]
        arguments = cuda_launches.Arguments.from_buffer_copy(parameters[0][0])
        self.launches.append((kernel, variant, x, arguments))
        self.settings.append(((x, y, z), (threads, ty, tz), shared, stream, self.context))
        return self.run(kernel, variant, x, arguments)

    def _get_context(self, to):
        to[0] = self.context
        return 0

    def _set_context(self, context):
        self.contexts.append(context)
        self.context = context
        return 0

    def _say(self, status, to):
        to[0] = self.failing[1]
        return 0

    def _is_capturing(self, stream, to):
        to[0] = int(self.capturing)
        return 0

    def _handle(self, stream):
        return self.STREAM


class Emulator(StubDriver):
    """Has the backend 'cuda' compute on the CPU, the threads in an order that is drawn; for monkeypatch.

    Attributes:
        seed: Of the order.
        change: A text in the forward's source and what to put there instead, to see that it matters.
    """

    def __init__(self, monkeypatch, seed=0, change=None):
        self.seed, self.change = seed, change
        super().__init__(monkeypatch, load()[0])

    def run(self, kernel, variant, blocks, arguments):
        """Run a launch; what goes wrong is the driver's message."""
        spans = ranges(kernel, variant, blocks, arguments)
        message = ctypes.create_string_buffer(400)
        change = self.change if kernel == 'forward' else None
        try:
            failed = library(kernel, variant, change)(
                arguments, blocks, self.seed, (Range * len(spans))(*spans), len(spans), message, len(message)
            )  # fmt: skip
        except AssertionError as error:  # of the compiler
            failed, message.value = 1, str(error).encode()[:399]
        self.failing = failed, message.value
        return failed


def ranges(kernel, variant, blocks, a):
    """List what a kernel may access, as far as its arguments point to."""
    phases = min(a.dilation, a.height) * min(a.dilation, a.width)
    batch = blocks // (a.heads * phases * a.across * a.pieces)
    channels, table = a.heads * variant.depth, variant.depth // 2 * variant.window * 2
    sums = batch * a.heads * a.height * a.width * 4

    def of_map(name):
        x = getattr(a, name)
        last = (batch - 1) * x.image + (a.height - 1) * x.row + (a.width - 1) * x.col
        return x.data, 2 * (last + channels)

    maps = ['query', 'value', *['key'][: variant.has_key]]
    if kernel == 'forward':
        written = [of_map('output'), (a.lse, sums)]
    elif kernel == 'backward_queries':
        written = [of_map('grad_query'), (a.delta, sums)]
        if variant.has_rel:
            written.append((a.partials, blocks * variant.depth * variant.window * 4))
    else:
        written = [of_map(name) for name in ('grad_value', *['grad_key'][: variant.has_key])]
    read = [of_map(name) for name in maps]
    if kernel != 'forward':
        read += [of_map('grad'), (a.lse, sums)]
    if kernel == 'backward_keys':
        read.append((a.delta, sums))
    if variant.has_rel:
        heads = a.heads if a.table_stride else 1
        read += [(a.rel_row, heads * table), (a.rel_col, heads * table)]
    spans = [(each, 0) for each in read] + [(each, 1) for each in written]
    return [Range(begin, begin + size, writable) for (begin, size), writable in spans]
