"""The shared library of C++ kernels: which file fits the installed torch, and its functions.

The library uses torch's C++ interface, which changes with each minor version of torch, and nothing of Python's
own. So there is one file per minor version, and it serves every Python. setup.py reads its name here.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch

_FOLDER = Path(__file__).parent
_LogsChoices = ctypes.CFUNCTYPE(ctypes.c_bool)
_DEVICE_TYPES = {'cpu': 0, 'cuda': 1}  # as in torch's DeviceType.h; the CPU's are for tests
_BUILD = '`pip install --no-deps --no-build-isolation path/to/sasa_det` builds them with g++'


def file_name(version: str, cxx11_abi: bool) -> str:
    """Name the file that is built for a torch.

    Args:
        version: The version of torch, of which the first two numbers count.
        cxx11_abi: Whether torch has the newer types of the C++ library, as ``torch.compiled_with_cxx11_abi()``
            says. PyPI's torch has them from 2.7 on.

    Examples:
        >>> file_name('2.13.0+cpu', True), file_name('2.2.2', False)
        ('_native.torch2.13.so', '_native.torch2.2-oldabi.so')
    """
    major, minor = version.split('.')[:2]
    return f'_native.torch{major}.{minor}{"" if cxx11_abi else "-oldabi"}.so'


class _Variant(ctypes.Structure):
    """``Variant`` of csrc/gpu.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ('bfloat16', 'depth', 'window', 'masked', 'dilated', 'has_key', 'has_rel')
    ]


def _numbers(device: torch.device) -> Tuple[int, int]:
    return _DEVICE_TYPES[device.type], -1 if device.index is None else device.index


class NativeLibrary:
    """The functions of a library that are no operators of torch.

    Args:
        path: The file.

    Attributes:
        LARGEST_KERNEL: Edge of the largest window that the kernels take.
        LARGEST_STRIDE: The largest stride.
        HUGE_FROM: Bytes from which on memory gets huge pages.

    Raises:
        OSError: The file cannot be loaded.
        AttributeError: It was built from older source and lacks a function.
    """

    def __init__(self, path: Path):
        # Unlike CDLL, it keeps Python's lock: the functions return within microseconds.
        functions = ctypes.PyDLL(str(path))

        def declare(name, result, *arguments):
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
            return function

        self.LARGEST_KERNEL = declare('sasa_largest_kernel', ctypes.c_int64)()
        self.LARGEST_STRIDE = declare('sasa_largest_stride', ctypes.c_int64)()
        self.HUGE_FROM = declare('sasa_huge_from', ctypes.c_int64)()
        self.threads = declare('sasa_threads', ctypes.c_int64)
        self._capability = declare('sasa_capability', ctypes.c_char_p)
        self.ask_for_huge_pages = declare(
            'sasa_ask_for_huge_pages', None, ctypes.c_void_p, ctypes.c_size_t
        )
        self._take_over = declare('sasa_take_over', None, _LogsChoices)
        gpu, variant = (ctypes.c_int, ctypes.c_int), ctypes.POINTER(_Variant)
        handle = ctypes.c_void_p
        self._cuda_connect = declare('sasa_cuda_connect', None, ctypes.POINTER(handle))
        self._cuda_stream = declare('sasa_cuda_stream', handle, *gpu)
        self._cuda_register = declare(
            'sasa_cuda_register', None, *gpu, variant, ctypes.c_int, handle, ctypes.c_uint, handle
        )
        self._cuda_trust = declare('sasa_cuda_trust', None, *gpu, variant)
        self.cuda_forget = declare('sasa_cuda_forget', None)

    def capability(self) -> str:
        """Say which CPU the kernels in use are compiled for: 'avx512', 'avx2' or 'default'."""
        return self._capability().decode()

    def take_over(self, logs_choices) -> None:
        """Register the kernels as the op's CPU implementation.

        Args:
            logs_choices: Says whether 'auto' must go through Python, which logs the chosen backend.
        """
        # Kept, as torch's dispatcher calls it as long as the process lives.
        self._logs_choices = _LogsChoices(logs_choices)
        self._take_over(self._logs_choices)

    def cuda_connect(self, functions: Sequence) -> None:
        """Hand over the functions by which CUDA kernels are launched; csrc/gpu.cpp lists them.

        Args:
            functions: Functions of ctypes.
        """
        self._cuda_functions = functions  # kept, as they may be written in Python
        addresses = [ctypes.cast(function, ctypes.c_void_p) for function in functions]
        self._cuda_connect((ctypes.c_void_p * len(functions))(*addresses))

    def cuda_stream(self, device: torch.device) -> int:
        """Return the driver's handle of a GPU's current stream, as the kernels are launched on.

        Args:
            device: The GPU.
        """
        return self._cuda_stream(*_numbers(device)) or 0

    def cuda_register(
        self,
        device: torch.device,
        variant: Sequence,
        kernel: int,
        function: int,
        shared: int,
        context: int,
    ) -> None:
        """Have a CUDA kernel launched without Python from now on.

        Args:
            device: The GPU that it is loaded on.
            variant: What it is compiled for, as integers.
            kernel: Its number.
            function: The driver's handle of it.
            shared: Bytes of shared memory of a block.
            context: The driver's handle of the context that it is loaded in.
        """
        self._cuda_register(
            *_numbers(device), _Variant(*variant), kernel, function, shared, context
        )  # fmt: skip

    def cuda_trust(self, device: torch.device, variant: Sequence) -> None:
        """Let 'auto' take a variant of the CUDA kernels.

        Args:
            device: The GPU.
            variant: As in `cuda_register`.
        """
        self._cuda_trust(*_numbers(device), _Variant(*variant))


@cache
def load() -> Tuple[Optional[NativeLibrary], Optional[str]]:
    """Load the file that fits the installed torch, once.

    Returns:
        The library, None if there is none; and then the reason.

    Examples:
        >>> library, why_not = load()
        >>> (library is None) is (why_not is not None)
        True
    """
    path = _FOLDER / file_name(torch.__version__, torch.compiled_with_cxx11_abi())
    if not path.exists():
        return None, _why_none_fits()
    try:
        return NativeLibrary(path), None
    except OSError as error:
        return None, f'its C++ kernels do not load: {error}; {_BUILD}'
    except AttributeError as error:
        return None, f'its C++ kernels were built from older source ({error}); {_BUILD}'


def _why_none_fits() -> str:
    here = file_name(torch.__version__, torch.compiled_with_cxx11_abi())
    others = sorted(path.name for path in _FOLDER.glob('_native.torch*.so'))
    if not others:
        return f'its C++ kernels are not built ({here} is missing); {_BUILD}'
    return (
        f'it has C++ kernels for other versions of torch ({", ".join(others)}), '
        f'but not for torch {torch.__version__} ({here}); {_BUILD}'
    )
