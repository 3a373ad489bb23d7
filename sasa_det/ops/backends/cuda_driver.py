"""How the CUDA kernels are compiled, kept on disk and loaded: NVRTC and the driver's API, by ctypes.

A kernel is compiled at its first use, which takes about a second. The result is kept in a folder of the user's
cache, by its source, its options, the GPU's architecture and the compiler's version. No CUDA toolkit is needed:
NVRTC comes with the builds of torch for CUDA, and libcuda with the GPU's driver.

A loaded kernel is registered in the C++ library, which launches it from then on (``csrc/gpu.cpp``). Where there
is no library, it is launched here.
"""

import ctypes
import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch

from ..native_library import load as load_library
from .cuda_launches import KERNELS, Launch, Variant, macros, shared_bytes

logger = logging.getLogger('sasa_det')

SOURCES = Path(__file__).resolve().parents[1] / 'csrc' / 'cuda'
HEADERS = ('tile.cuh', 'device.cuh', 'arguments.cuh')
_OLDEST_GPU = (8, 0)
_THREADS = 256
# From cuda.h and nvrtc.h.
_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


def missing() -> Optional[str]:
    """Say why the kernels cannot be compiled or launched here; None if they can."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return 'it computes on NVIDIA GPUs, and torch finds none here'
    newest = max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if newest < _OLDEST_GPU:
        least, has = ('.'.join(map(str, x)) for x in (_OLDEST_GPU, newest))
        return (
            f'it takes GPUs of compute capability {least} and later, but the newest here has {has}'
        )
    return _lacking()


@cache
def _lacking() -> Optional[str]:
    """Say what of this installation's files is not there."""
    wanted = (*HEADERS, *(f'{kernel}.cu' for kernel in KERNELS))
    absent = [name for name in wanted if not (SOURCES / name).is_file()]
    if absent:
        return f'its sources are not installed: {SOURCES} lacks {", ".join(absent)}'
    for library in (nvrtc, driver):
        try:
            library()
        except OSError as error:
            return str(error)
    return None


# --- Libraries


@cache
def nvrtc() -> ctypes.CDLL:
    """Load NVRTC, as torch's CUDA has it.

    Raises:
        OSError: There is none; names what was looked for.
    """
    major = (torch.version.cuda or '').partition('.')[0]
    name = f'libnvrtc.so.{major}' if major else 'libnvrtc.so'
    packages = Path(torch.__file__).resolve().parents[1]
    found = sorted(packages.glob(f'nvidia/*/lib/{name}*')) + sorted(
        packages.glob(f'torch/lib/{name}*')
    )
    candidates = [name, *map(str, found)]
    return _load(candidates, f'NVRTC, which compiles its kernels, was not found: {name}')


@cache
def driver() -> ctypes.CDLL:
    """Load the GPU's driver.

    Raises:
        OSError: There is none.
    """
    return _load(['libcuda.so.1'], "the GPU's driver was not found: libcuda.so.1")


def _load(candidates: List[str], otherwise: str) -> ctypes.CDLL:
    errors = []
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            errors.append(str(error))
    raise OSError(f'{otherwise} ({errors[-1]})')


# --- Compiler


class CompileError(RuntimeError):
    """What NVRTC says of a source."""


def _nvrtc_call(name: str, *arguments) -> None:
    library = nvrtc()
    status = getattr(library, name)(*arguments)
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f'{name}: {library.nvrtcGetErrorString(status).decode()}')


def compiler_version() -> Tuple[int, int]:
    """Return NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc_call('nvrtcVersion', ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def _architectures() -> List[int]:
    count = ctypes.c_int()
    _nvrtc_call('nvrtcGetNumSupportedArchs', ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _nvrtc_call('nvrtcGetSupportedArchs', numbers)
    return sorted(numbers)


def architecture_of(capability: Tuple[int, int]) -> str:
    """Name what to compile for: a GPU's own code, or what its driver compiles further if NVRTC is older.

    Args:
        capability: The GPU's compute capability.

    Raises:
        CompileError: NVRTC knows no such GPU, and no older one.
    """
    wanted = 10 * capability[0] + capability[1]
    known = [number for number in _architectures() if number <= wanted]
    if not known:
        raise CompileError(
            f'NVRTC {compiler_version()} cannot compile for compute capability {capability}'
        )
    return f'sm_{wanted}' if wanted in known else f'compute_{known[-1]}'


def options_of(kernel: str, variant: Variant, architecture: str) -> List[str]:
    """List the compiler's options.

    Args:
        kernel: A kernel's name.
        variant: What it is compiled for.
        architecture: Such as 'sm_90'.
    """
    defined = (f'-D{name}={value}' for name, value in macros(kernel, variant).items())
    return [f'--gpu-architecture={architecture}', '--std=c++17', *defined]


def compile_kernel(kernel: str, options: List[str]) -> bytes:
    """Compile a kernel with NVRTC.

    Args:
        kernel: A kernel's name.
        options: From `options_of`.

    Returns:
        Code for the driver.

    Raises:
        CompileError: With the compiler's messages.
    """
    encoded = [(SOURCES / name).read_bytes() for name in HEADERS]
    headers = (ctypes.c_char_p * len(encoded))(*encoded)
    names = (ctypes.c_char_p * len(encoded))(*(name.encode() for name in HEADERS))
    program = ctypes.c_void_p()
    source, name = (SOURCES / f'{kernel}.cu').read_bytes(), f'{kernel}.cu'.encode()
    texts = (len(encoded), headers, names)
    _nvrtc_call('nvrtcCreateProgram', ctypes.byref(program), source, name, *texts)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc().nvrtcCompileProgram(program, len(options), given)
        if status:
            said = _nvrtc_result(program, 'nvrtcGetProgramLogSize', 'nvrtcGetProgramLog')
            raise CompileError(
                f'{kernel}.cu does not compile: {said.rstrip(bytes(1)).decode().strip()}'
            )
        kind = 'CUBIN' if options[0].startswith('--gpu-architecture=sm_') else 'PTX'
        return _nvrtc_result(program, f'nvrtcGet{kind}Size', f'nvrtcGet{kind}')
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_result(program: ctypes.c_void_p, get_size: str, get: str) -> bytes:
    size = ctypes.c_size_t()
    _nvrtc_call(get_size, program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _nvrtc_call(get, program, text)
    return text.raw


# --- Cache


def cache_folder() -> Path:
    """Return the folder of compiled kernels: SASA_DET_CACHE, or one in the user's cache.

    Examples:
        >>> cache_folder().name
        'cuda'
    """
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(os.environ.get('SASA_DET_CACHE') or Path(base) / 'sasa_det') / 'cuda'


def compiled(kernel: str, variant: Variant, capability: Tuple[int, int]) -> bytes:
    """Return a kernel's code from the cache, or compile and keep it.

    A folder that cannot be read or written is passed over: the kernel is compiled in each process then.

    Args:
        kernel: A kernel's name.
        variant: What it is compiled for.
        capability: The GPU's compute capability.

    Raises:
        CompileError: With the compiler's messages.
    """
    options = options_of(kernel, variant, architecture_of(capability))
    sources = [(SOURCES / name).read_bytes() for name in (*HEADERS, f'{kernel}.cu')]
    key = hashlib.sha256(repr((sources, options, compiler_version())).encode()).hexdigest()
    path = cache_folder() / f'{kernel}-{key[:32]}.bin'
    try:
        content = path.read_bytes()
        # A file that a crash cut short is compiled anew.
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    except OSError:
        pass
    code = compile_kernel(kernel, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError as error:
        logger.debug('a compiled CUDA kernel was not kept: %s', error)
    return code


# --- Load


class DriverError(RuntimeError):
    """What the driver says of a call."""


def _driver_call(name: str, *arguments) -> None:
    library = driver()
    status = getattr(library, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f'{name}: {(text.value or b"").decode() or status}')


@cache
def shared_limit(device: torch.device) -> int:
    """Return the shared memory that a block may take on a GPU, in bytes.

    Args:
        device: The GPU.
    """
    if not _is_recent(device):
        return 0
    number, handle = ctypes.c_int(), ctypes.c_int()
    _driver_call('cuInit', 0)
    _driver_call('cuDeviceGet', ctypes.byref(handle), _index(device))
    _driver_call('cuDeviceGetAttribute', ctypes.byref(number), _SHARED_OPTIN, handle)
    return number.value


def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _OLDEST_GPU


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class _Loaded(NamedTuple):
    """A kernel in a GPU's memory."""

    function: int
    shared: int
    context: int


_loaded: Dict[Tuple[torch.device, str, Variant], _Loaded] = {}


def load(device: torch.device, kernel: str, variant: Variant) -> _Loaded:
    """Compile and load a kernel at its first use, and register it in the C++ library.

    Args:
        device: The GPU, with its index.
        kernel: One of KERNELS.
        variant: What it is compiled for.

    Raises:
        CompileError: The kernel does not compile.
        DriverError: The driver refuses it.
        RuntimeError: A CUDA graph is being captured.
    """
    key = device, kernel, variant
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = _load_kernel(*key)
        if connected():
            library, _ = load_library()
            library.cuda_register(device, _as_integers(variant), KERNELS.index(kernel), *found)
    return found


def trust(device: torch.device, variant: Variant) -> None:
    """Let 'auto' take a variant in the C++ library, too.

    Args:
        device: The GPU, with its index.
        variant: What its kernels are compiled for.
    """
    if connected():
        load_library()[0].cuda_trust(device, _as_integers(variant))


def _as_integers(variant: Variant) -> List[int]:
    return [int(variant.dtype == torch.bfloat16), *map(int, variant[1:])]


def _load_kernel(device: torch.device, kernel: str, variant: Variant) -> _Loaded:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f'local_attention: the CUDA kernel {kernel} for {variant} is not loaded yet, and cannot be while a '
            'CUDA graph is captured; call it once before'
        )
    code = compiled(kernel, variant, torch.cuda.get_device_capability(device))
    module, function, context = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    handle = ctypes.c_int()
    with torch.cuda.device(device):
        # torch's context, which a thread of autograd may not have yet.
        _driver_call('cuDeviceGet', ctypes.byref(handle), device.index)
        _driver_call('cuDevicePrimaryCtxRetain', ctypes.byref(context), handle)
        _driver_call('cuCtxSetCurrent', context)
        _driver_call('cuModuleLoadData', ctypes.byref(module), code)
        _driver_call('cuModuleGetFunction', ctypes.byref(function), module, kernel.encode())
        shared = shared_bytes(kernel, variant)
        _driver_call('cuFuncSetAttribute', function, _SHARED_ATTRIBUTE, shared)
    return _Loaded(function.value, shared, context.value)


# --- Launch

# Of libcuda, in the order of csrc/gpu.cpp.
_FUNCTIONS = (
    'cuLaunchKernel', 'cuCtxGetCurrent', 'cuCtxSetCurrent', 'cuGetErrorString', 'cuStreamIsCapturing',
)  # fmt: skip
_STREAM = '_ZNK3c104cuda10CUDAStream6streamEv'  # c10::cuda::CUDAStream::stream() const


@cache
def connected() -> bool:
    """Say whether the C++ library launches the kernels; hands it what it needs for that the first time."""
    library, reason = load_library()
    if library is None:
        logger.debug('CUDA kernels are launched from Python: %s', reason)
        return False
    try:
        torch_cuda = ctypes.CDLL(str(Path(torch.__file__).parent / 'lib' / 'libc10_cuda.so'))
        functions = [getattr(driver(), name) for name in _FUNCTIONS]
        library.cuda_connect([*functions, getattr(torch_cuda, _STREAM)])
    except (OSError, AttributeError) as error:
        logger.debug('CUDA kernels are launched from Python: %s', error)
        return False
    # A stream of its own, as the default's handle is zero.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        agrees = library.cuda_stream(stream.device) == stream.cuda_stream
    if not agrees:
        logger.debug('CUDA kernels are launched from Python: the C++ library finds another stream')
    return agrees


def run(launch: Launch) -> None:
    """Queue a launch on the current stream of its tensors' GPU, where there is no C++ library.

    Args:
        launch: From ``cuda_launches.launch``.

    Raises:
        CompileError: The kernel does not compile.
        DriverError: The driver refuses it.
    """
    device = launch.reads[0].device
    with torch.cuda.device(device):
        loaded = load(device, launch.kernel, launch.variant)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
        _driver_call('cuCtxSetCurrent', ctypes.c_void_p(loaded.context))
        function = ctypes.c_void_p(loaded.function)
        _driver_call(
            'cuLaunchKernel', function, launch.blocks, 1, 1, _THREADS, 1, 1, loaded.shared,
            ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream), pointers, None,
        )  # fmt: skip
