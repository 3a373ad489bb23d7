"""What the CUDA backend does around its kernels: refusals, cache, launches, and when 'auto' takes it.

Stubs stand in the place of a GPU. test_cuda_emulated.py is about the kernels.
"""

import ctypes
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import Case, with_grad
from cuda_emulator import Emulator, StubDriver

from sasa_det.ops import available_backends
from sasa_det.ops.backends import choice, cuda, cuda_driver, cuda_launches, triton
from sasa_det.ops.backends.cuda_launches import Variant
from sasa_det.ops.native_library import load
from sasa_det.ops.window import Window

PLAIN = Variant(torch.bfloat16, 8, 3)
CONNECTED = cuda_driver.connected  # without the stubs' patch
CACHES = (
    cuda_driver._lacking,
    cuda_driver.nvrtc,
    cuda_driver.driver,
    cuda_driver.shared_limit,
)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU; its capability may be changed."""
    found = SimpleNamespace(capability=(9, 0), capturing=False)
    monkeypatch.setattr(torch.version, 'hip', None)
    for name, stub in dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_capability=lambda device=None: found.capability,
        is_current_stream_capturing=lambda: found.capturing,
        current_stream=lambda device=None: SimpleNamespace(cuda_stream=7),
        device=lambda device: nullcontext(),
    ).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    for cached in CACHES:
        cached.cache_clear()
    yield found
    for cached in CACHES:
        cached.cache_clear()


def like_cuda(shape, dtype=torch.bfloat16, format=torch.channels_last):
    """A tensor that says that it is on a GPU."""
    x = torch.empty(shape, dtype=dtype, device='meta').contiguous(memory_format=format)
    return SimpleNamespace(
        device=torch.device('cuda', 0),
        dtype=dtype,
        shape=x.shape,
        stride=x.stride,
        data_ptr=lambda: 0,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_says_that_there_is_no_gpu():
    assert available_backends()['cuda'] == 'it computes on NVIDIA GPUs, and torch finds none here'


def test_says_what_is_missing(gpu, monkeypatch, tmp_path):
    def nothing(name):
        raise OSError(f'{name}: no such file')

    monkeypatch.setattr(ctypes, 'CDLL', nothing)
    assert 'NVRTC, which compiles its kernels, was not found: libnvrtc.so' in cuda.missing()
    cuda_driver._lacking.cache_clear()
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: nothing(name) if 'cuda' in name else object())
    assert "the GPU's driver was not found: libcuda.so.1" in cuda.missing()
    cuda_driver._lacking.cache_clear()
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
    cuda_driver.nvrtc.cache_clear()
    cuda_driver.driver.cache_clear()
    assert cuda.missing() is None
    gpu.capability = (7, 5)
    assert 'capability 8.0 and later, but the newest here has 7.5' in cuda.missing()
    gpu.capability = (8, 0)
    cuda_driver._lacking.cache_clear()
    monkeypatch.setattr(cuda_driver, 'SOURCES', tmp_path)
    assert f'{tmp_path} lacks tile.cuh, device.cuh, arguments.cuh' in cuda.missing()


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(), None),
        (dict(dtype=torch.float32), 'takes bfloat16 and float16, but query is torch.float32'),
        (dict(kernel_size=13), 'kernel_size of (3, 5, 7, 9, 11), but it is 13'),
        (dict(channels=48), '(8, 16, 32, 64) channels a head, but there are 24'),
        (dict(scale=-1.0), 'a positive scale, but it is -1.0'),
        (
            dict(format=torch.contiguous_format),
            'channels_last that begin at a multiple of 16 bytes',
        ),
        (
            dict(channels=128),
            'takes 221184 bytes of shared memory for 64 channels a head and kernel_size 7',
        ),
    ],
)
def test_refuses_what_it_does_not_take(change, said, monkeypatch):
    monkeypatch.setattr(cuda_driver, 'shared_limit', lambda device: 166912)
    shape = (1, change.get('channels', 64), 9, 10)
    query = like_cuda(
        shape, change.get('dtype', torch.bfloat16), change.get('format', torch.channels_last)
    )
    window = Window(change.get('kernel_size', 7), 2, scale=change.get('scale', 1.0))
    reason = cuda.refuse(query, window)
    assert reason is None if said is None else said in reason


def test_keeps_what_it_compiled(monkeypatch, tmp_path):
    made = []

    def compile_kernel(kernel, options):
        made.append((kernel, options))
        return f'code {len(made)}'.encode()

    monkeypatch.setenv('SASA_DET_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(cuda_driver, 'compile_kernel', compile_kernel)
    monkeypatch.setattr(cuda_driver, 'compiler_version', lambda: (13, 0))
    monkeypatch.setattr(cuda_driver, '_architectures', lambda: [80, 90])

    def get(variant=PLAIN, capability=(9, 0)):
        return cuda_driver.compiled('forward', variant, capability)

    assert get() == get() == b'code 1'
    assert '--gpu-architecture=sm_90' in made[0][1] and '-DDEPTH=8' in made[0][1]
    assert get(PLAIN._replace(depth=16)) == b'code 2'
    assert get(capability=(8, 0)) == b'code 3'
    # A GPU that this NVRTC does not know: the driver compiles further.
    assert get(capability=(10, 0)) == b'code 4' and '--gpu-architecture=compute_90' in made[-1][1]
    monkeypatch.setattr(cuda_driver, 'compiler_version', lambda: (13, 1))
    assert get() == b'code 5'
    *_, newest = sorted(
        (tmp_path / 'cache' / 'cuda').iterdir(), key=lambda path: path.stat().st_mtime_ns
    )
    newest.write_bytes(newest.read_bytes()[:-1])
    assert get() == b'code 6', 'a file that is cut short'
    (tmp_path / 'file').touch()
    monkeypatch.setenv('SASA_DET_CACHE', str(tmp_path / 'file'))
    assert get() == b'code 7', 'a folder that cannot be'


@pytest.mark.skipif(load()[0] is None, reason='native: there are no C++ kernels')
@pytest.mark.parametrize('handle', [StubDriver.STREAM, 8])
def test_the_library_launches_if_it_finds_the_stream(handle, gpu, monkeypatch, caplog):
    StubDriver(monkeypatch, load()[0])
    stubs = load()[0]._cuda_functions
    torch_cuda = SimpleNamespace(**{cuda_driver._STREAM: stubs[-1]})
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: torch_cuda)
    monkeypatch.setattr(
        cuda_driver, 'driver', lambda: SimpleNamespace(**dict(zip(cuda_driver._FUNCTIONS, stubs)))
    )
    stream = SimpleNamespace(device=torch.device('cpu'), cuda_stream=handle)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda: stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    with caplog.at_level(logging.DEBUG, logger='sasa_det'):
        assert CONNECTED.__wrapped__() == (handle == StubDriver.STREAM)
    assert [each.getMessage() for each in caplog.records] == (
        [] if handle == StubDriver.STREAM
        else ['CUDA kernels are launched from Python: the C++ library finds another stream']
    )  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None, reason='torch is built for CUDA')
def test_says_why_python_launches(caplog):
    with caplog.at_level(logging.DEBUG, logger='sasa_det'):
        assert not CONNECTED.__wrapped__()
    assert 'CUDA kernels are launched from Python: ' in caplog.text


class Driver:
    """Records what it is asked for."""

    def __init__(self):
        self.calls, self.failing = [], None

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            return int(name == self.failing)

        return call

    def names(self):
        names, self.calls = [name for name, _ in self.calls], []
        return names


def test_launches(gpu, monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda_driver, 'driver', lambda: driver)
    monkeypatch.setattr(cuda_driver, 'compiled', lambda *what: b'code')
    monkeypatch.setattr(cuda_driver, '_loaded', {})
    monkeypatch.setattr(cuda_driver, 'connected', lambda: False)
    x = torch.zeros(2, 16, 20, 17, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    window = Window(3, 2)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match='while a CUDA graph is captured; call it once before'):
        cuda.forward(x, x, x, None, None, window)
    gpu.capturing = False
    cuda.forward(x, x, x, None, None, window)
    name, arguments = driver.calls[-1]
    assert name == 'cuLaunchKernel'
    # 2 images of 2 heads, 2 strips of 16 columns, 2 pieces of at most 2 chunks of 8 rows.
    assert arguments[1:8] == (
        16,
        1,
        1,
        256,
        1,
        1,
        cuda_launches.shared_bytes('forward', PLAIN._replace(has_rel=False)),
    )
    assert arguments[8].value == 7, 'the current stream'
    names = driver.names()
    assert names == [
        'cuDeviceGet',
        'cuDevicePrimaryCtxRetain',
        'cuCtxSetCurrent',
        'cuModuleLoadData',
        'cuModuleGetFunction',
        'cuFuncSetAttribute',
        'cuCtxSetCurrent',
        'cuLaunchKernel',
    ]
    gpu.capturing = True
    cuda.forward(x, x, x, None, None, window)
    assert driver.names() == ['cuCtxSetCurrent', 'cuLaunchKernel'], (
        'nothing is loaded while a graph is captured'
    )
    driver.failing = 'cuLaunchKernel'
    with pytest.raises(cuda_driver.DriverError, match='cuLaunchKernel'):
        cuda.forward(x, x, x, None, None, window)


@pytest.mark.parametrize('layout', ['alike', 'contiguous key', 'not aligned'])
def test_takes_maps_of_any_layout(layout, monkeypatch):
    """Keys and values that do not lie as the kernels want are copied, and gradients copied back."""
    seen = []
    monkeypatch.setattr(cuda_driver, 'run', seen.append)
    monkeypatch.setattr(cuda_driver, 'connected', lambda: False)
    case = Case(3, depth=8, batch=1)
    query, key, value, *tables = with_grad(case.inputs(torch.bfloat16))
    if layout == 'not aligned':
        wide = torch.zeros(1, 17, 6, 7, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        value = wide[:, 1:]
    query = query.detach().contiguous(memory_format=torch.channels_last)
    if layout == 'alike':
        key, value = (
            x.detach().contiguous(memory_format=torch.channels_last) for x in (key, value)
        )
    output, logsumexp = cuda.forward(
        query, key.detach(), value.detach(), *tables, Window(**case.options)
    )
    (launch,) = seen
    arguments = launch.arguments
    assert (arguments.key.data == key.data_ptr()) == (layout == 'alike')
    assert arguments.query.data == query.data_ptr() and arguments.output.data == output.data_ptr()
    for name in ('query', 'key', 'value', 'output'):
        found = getattr(arguments, name)
        assert (found.image, found.row, found.col) == (0, 7 * 16, 16), name


def test_auto_takes_it_only_if_trusted(monkeypatch):
    for module in (cuda, triton):
        monkeypatch.setattr(module, 'missing', lambda: None)
        monkeypatch.setattr(module, 'refuse', lambda query, window: None)
    query, asked = like_cuda((1, 16, 9, 9)), []

    def distrust(query, window, has_key, has_rel):
        asked.append((has_key, has_rel))
        return reason

    monkeypatch.setattr(cuda, 'distrust', distrust)
    reason = 'it differs'
    assert choice.choose_backend('auto', query, Window(3, 2), False, True) is triton
    assert choice.choose_backend('cuda', query, Window(3, 2)) is cuda, 'whoever names it gets it'
    reason = None
    assert choice.choose_backend('auto', query, Window(3, 2), True, False) is cuda
    assert asked == [(False, True), (True, False)]


def test_is_compared_before_it_is_trusted(gpu, monkeypatch, caplog):
    query = torch.zeros(1, 8, 5, 5, dtype=torch.bfloat16)
    monkeypatch.setattr(triton, 'missing', lambda: 'not here')
    monkeypatch.setattr(cuda, '_outcomes', {})
    gpu.capturing = True
    assert 'before the capture' in cuda.distrust(query, Window(3, 1), True, True)
    gpu.capturing = False
    Emulator(monkeypatch)
    with caplog.at_level(logging.DEBUG, logger='sasa_det'):
        assert cuda.distrust(query, Window(3, 1), True, True) is None
        assert cuda.distrust(query, Window(3, 1), True, True) is None
    (record,) = caplog.records
    assert 'agree with another backend' in record.getMessage() and record.levelname == 'DEBUG'
    caplog.clear()
    cuda._outcomes.clear()
    Emulator(monkeypatch, change=('store(o, reciprocal(sum[0]),', 'store(o, 1.f,'))
    with caplog.at_level(logging.DEBUG, logger='sasa_det'):
        for _ in range(2):
            reason = cuda.distrust(query, Window(3, 1), True, True)
            assert reason.startswith('output differs from that of eager by ')
    (record,) = caplog.records
    assert reason in record.getMessage() and record.levelname == 'WARNING'


def test_is_compared_for_the_doctor(gpu, monkeypatch):
    monkeypatch.setattr(triton, 'missing', lambda: 'not here')
    monkeypatch.setattr(cuda, '_outcomes', {})
    Emulator(monkeypatch)
    assert cuda.distrust_layer('cpu') is None
    ((_, variant),) = cuda._outcomes
    assert variant == Variant(torch.bfloat16, depth=32, window=7)
