"""From a layer to the launches of the CUDA kernels, in C++: on the CPU, with a stub in the driver's place.

test_cuda_driver.py is about what Python does before: compiling and loading. test_cuda_emulated.py is about the
kernels.
"""

import ctypes

import pytest
import torch
import torch.distributed as dist
from cases import Case, rms
from cuda_emulator import Emulator, StubDriver
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import local_attention
from sasa_det.ops.backends import cuda, cuda_driver
from sasa_det.ops.backends.cuda_launches import KERNELS, Variant, shared_bytes, variant_of
from sasa_det.ops.flop_counters import count_layer_macs
from sasa_det.ops.native_library import load
from sasa_det.ops.window import Window, empty_output

LIBRARY, WHY_NOT = load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f'native: {WHY_NOT}')
EVERY_DEVICE = torch._C.DispatchKey.CompositeExplicitAutograd
VARIANT = Variant(torch.bfloat16, 8, 3)


@pytest.fixture
def driver(monkeypatch):
    """A stub that records launches, with the kernels of all the tests loaded."""
    stub = StubDriver(monkeypatch, LIBRARY)
    load_kernels()
    return stub


@pytest.fixture
def emulator(monkeypatch):
    """A stub that runs the kernels."""
    stub = Emulator(monkeypatch)
    load_kernels()
    return stub


def load_kernels(variant=VARIANT):
    for kernel in KERNELS:
        cuda_driver.load(torch.device('cpu'), kernel, variant)


def make(dtype=torch.bfloat16, **changes):
    """Make a layer, and a map for it."""
    torch.manual_seed(0)
    given = dict(
        in_channels=8, out_channels=16, kernel_size=3, num_heads=2, bias=True, init='random'
    )
    layer = LocalSelfAttention2d(**{**given, 'backend': 'cuda', **changes}).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(1, 8, 9, 7).contiguous(memory_format=torch.channels_last).to(dtype)
    return layer, x.requires_grad_()


def results(layer, x):
    """Compute a layer's output and the gradients of its input and its parameters."""
    y = layer(x)
    generator = torch.Generator().manual_seed(1)
    grad = (
        torch.randn(y.shape, generator=generator)
        .to(y)
        .contiguous(memory_format=torch.channels_last)
    )
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def exact(layer, x):
    """The same by the reference, in float64."""
    twin, _ = make(torch.float64, backend='reference', position_per_head=layer.rel_row.shape[0] > 1)
    twin.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    return results(twin, x.detach().double().requires_grad_())


def assert_close(computed, expected, eps):
    for one, other in zip(computed, expected):
        assert rms(one.double() - other) <= 4 * eps * rms(other)


class Calls(TorchDispatchMode):
    """Counts the ATen operators that are called, also by the layer's own operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'sasa_det_cuda':
            with self:
                return func._op_dk(EVERY_DEVICE, *args, **(kwargs or {}))
        self.names.append(func.name().partition('::')[2])
        return func(*args, **(kwargs or {}))


# --- Values


@pytest.mark.parametrize('keep', [False, True], ids=['projects again', 'keeps'])
def test_computes_the_layer(keep, emulator):
    layer, x = make(keep_projections=keep)
    computed = results(layer, x)
    assert [each[0] for each in emulator.launches] == list(KERNELS)
    assert_close(computed, exact(layer, x), torch.finfo(torch.bfloat16).eps)
    for gradient, parameter in zip(computed[2:], layer.parameters()):
        assert gradient.is_contiguous() and gradient.dtype == parameter.dtype


def test_computes_tables_of_each_head(emulator):
    layer, x = make(position_per_head=True, bias=False)
    twin, _ = make(position_per_head=True, bias=False, backend='reference', dtype=torch.float64)
    twin.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    computed = results(layer, x)
    expected = results(twin, x.detach().double().requires_grad_())
    assert_close(computed, expected, torch.finfo(torch.bfloat16).eps)
    assert all(each.is_contiguous() for each in computed[2:])


def test_computes_in_autocast(emulator):
    layer, x = make(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        computed = results(layer, x)
    assert len(emulator.launches) == 3
    assert computed[0].dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in computed[1:])
    assert_close(computed, exact(layer, x), torch.finfo(torch.bfloat16).eps)


def test_is_differentiated_twice(emulator):
    layer, x = make()

    def twice(layer, x):
        y = layer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()])

    twin, _ = make(torch.float64, backend='reference')
    twin.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    assert_close(
        twice(layer, x), twice(twin, x.detach().double().requires_grad_()), 10 * torch.finfo(torch.bfloat16).eps
    )  # fmt: skip


def test_works_with_checkpoints_and_hooks(emulator):
    layer, x = make()
    plain = results(layer, x)
    shapes = []

    def pack(saved):
        shapes.append(tuple(saved.shape))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        hooked = results(layer, x)
    assert tuple(x.shape) in shapes and (1, 48, 9, 7) not in shapes
    checkpointed = results(_Checkpointed(layer), x)
    for other in (hooked, checkpointed):
        assert all(map(torch.equal, plain, other))


class _Checkpointed(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def test_works_in_ddp(emulator, recwarn):
    layer, x = make()
    plain = results(layer, x)[2:]
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=True)
        y = wrapped(x)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator).to(y))
    finally:
        dist.destroy_process_group()
    assert all(map(torch.equal, plain, (each.grad for each in layer.parameters())))
    assert not [each for each in recwarn if 'strides' in str(each.message)]


def test_compiles_as_an_operator(emulator):
    layer, x = make()
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    computed = results(compiled, x)
    assert len(emulator.launches) == 3
    assert_close(computed, exact(layer, x), torch.finfo(torch.bfloat16).eps)


# --- Calls


SETTINGS = {
    'bfloat16': dict(),
    'bfloat16, no bias': dict(bias=False),
    'autocast': dict(dtype=torch.float32),
    'autocast, tables of each head': dict(dtype=torch.float32, position_per_head=True),
    'kept': dict(keep_projections=True),
}


@pytest.mark.parametrize('setting', SETTINGS.values(), ids=SETTINGS)
def test_calls_few_operators(setting, driver):
    torch.use_deterministic_algorithms(False)  # which fills new memory, by one more call
    layer, x = make(**setting)
    x = x.detach().bfloat16().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled='dtype' in setting):
        results(layer, x)  # once per process, there is a marker to make
        layer.query.weight.data = layer.query.weight.data.clone()
        grad = torch.ones(1, 16, 9, 7).to(x).contiguous(memory_format=torch.channels_last)
        with Calls() as forward:
            y = layer(x)
        with Calls() as backward:
            torch.autograd.grad(y, [x, *layer.parameters()], grad)
    assert y.grad_fn.name() == 'LocalSelfAttentionBackward'
    assert len(forward.names) <= 4, forward.names
    assert len(backward.names) <= 8, backward.names
    assert ('convolution' in backward.names) != layer.keep_projections


def test_packs_weights_once_per_region_of_autocast(driver):
    layer, x = make(torch.float32)

    def packs(times=2):
        with Calls() as calls:
            for _ in range(times):
                layer(x)
        return calls.names.count('cat')

    with torch.autocast('cpu', torch.bfloat16):
        assert packs() == 1
        assert packs() == 0
        with torch.no_grad():
            assert packs() == 0
            layer.query.weight.add_(1)
        assert packs() == 1, 'a weight that was written'
        layer.query.weight.data = layer.query.weight.data.clone()
        assert packs() == 1, 'a weight that is elsewhere'
        driver.capturing = True
        assert packs() == 2, 'each time in a CUDA graph'
        driver.capturing = False
        assert packs() == 0
    with torch.autocast('cpu', torch.bfloat16):
        assert packs() == 1
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
        assert packs() == 2


def test_enters_no_python(driver, monkeypatch):
    def fail(*args):
        raise AssertionError('Python was entered')

    for name in ('forward', 'backward'):
        monkeypatch.setattr(cuda, name, fail)
    results(*make())
    inputs = [
        x.contiguous(memory_format=torch.channels_last)
        for x in torch.zeros(3, 1, 16, 5, 6).bfloat16()
    ]
    tables = torch.zeros(2, 1, 4, 3).bfloat16()
    query = inputs[0].requires_grad_()
    local_attention(*inputs, *tables, kernel_size=3, num_heads=2, backend='cuda').sum().backward()
    assert [each[0] for each in driver.launches] == 2 * list(KERNELS) and query.grad is not None


def test_counts_flops(driver):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = make()
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    forward = counter.get_total_flops()
    assert forward == 2 * count_layer_macs(layer, x.shape)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # The projection: again, and for both gradients. The attention: three products for each, but two for values.
    projection = 2 * 9 * 7 * 3 * 8 * 16
    values = 2 * 9 * 7 * 16 * 9
    assert counter.get_total_flops() == 3 * projection + 3 * (forward - projection) - values


# --- Launches


CASES = [
    Case(3, depth=8, size=(9, 19)),
    Case(5, depth=16, num_heads=3, positions='per_head', border='mask', dilation=2, size=(40, 33)),
    Case(7, depth=8, key=False, batch=3, size=(200, 20)),
    Case(3, depth=32, positions=None, dilation=9, size=(5, 4)),
    Case(9, depth=8, num_heads=1, positions='per_head', batch=1, size=(1, 1)),
]


@pytest.mark.parametrize('layout', ['channels_last', 'contiguous', 'not aligned'])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_launches_what_python_would(case, layout, monkeypatch):
    """Python's launches, which are made where there is no C++ library, have the same arguments."""
    driver = StubDriver(monkeypatch, LIBRARY)
    query, key, value, *tables = case.inputs(torch.bfloat16)
    if layout == 'channels_last':
        query, key, value = (
            x if x is None else x.contiguous(memory_format=torch.channels_last)
            for x in (query, key, value)
        )
    elif layout == 'not aligned':
        wide = torch.zeros(case.batch, query.shape[1] + 1, *case.size, dtype=torch.bfloat16)
        value = wide.contiguous(memory_format=torch.channels_last)[:, 1:]
    window = Window(**case.options)
    grad = torch.zeros_like(query)
    maps = [None if x is None else empty_output(x) for x in (query, key, value)]
    seen = []
    monkeypatch.setattr(cuda_driver, 'run', seen.append)
    for connected in (True, False):
        monkeypatch.setattr(cuda_driver, 'connected', lambda: connected)  # noqa: B023
        output, logsumexp = cuda.forward(query, key, value, *tables, window)
        made = cuda.backward(grad, query, key, value, *tables, logsumexp, tuple(maps), window)
        assert all((x is None) == (table is None) for x, table in zip(made, tables))
        assert output.shape == query.shape and logsumexp.dtype == torch.float32
    given = [x for x in (query, key, value, grad, *tables, *maps) if x is not None]
    known = {x.data_ptr(): number for number, x in enumerate(given)}

    def described(structure):
        found = {}
        for name, _ in structure._fields_:
            value = getattr(structure, name)
            if isinstance(value, ctypes.Structure):
                value = described(value)
            elif name in ('data', 'rel_row', 'rel_col', 'lse', 'delta', 'partials'):
                value = None if value is None else known.get(value, 'new')
            found[name] = value
        return found

    assert len(seen) == len(driver.launches) == 3
    for (kernel, variant, blocks, arguments), python in zip(driver.launches, seen):
        assert (kernel, variant, blocks) == (python.kernel, python.variant, python.blocks)
        # C++ has one structure for both kernels of the backward, Python gives each what it reads and writes.
        for name, expected in described(python.arguments).items():
            if expected is not None and (
                not isinstance(expected, dict) or expected['data'] is not None
            ):
                assert described(arguments)[name] == expected, name


def test_launches_on_the_stream_and_in_the_context_of_the_kernels(driver):
    layer, x = make()
    y = layer(x)
    ((blocks, threads, shared, stream, context),) = driver.settings
    assert blocks == (2, 1, 1) and threads == (256, 1, 1)
    assert (shared, stream, context) == (
        shared_bytes('forward', VARIANT),
        driver.STREAM,
        driver.CONTEXT,
    )
    assert driver.contexts == [driver.CONTEXT, None], 'as it was before'
    driver.context = driver.CONTEXT
    y.sum().backward()
    assert len(driver.contexts) == 2, 'it is current already'


def test_says_what_the_driver_says(driver):
    layer, x = make()
    y = layer(x)
    driver.failing = 700, b'an illegal memory access was encountered'
    with pytest.raises(
        RuntimeError, match='refuses the kernel forward .cuLaunchKernel.: an illegal memory access'
    ):
        layer(x)
    with pytest.raises(
        RuntimeError, match='refuses the kernel backward_queries .cuLaunchKernel.: an illegal'
    ):
        y.sum().backward()


# --- What is left to Python


def call(x, layer, backend='cuda', **changes):
    """Call the layer's operator, as projected_attention does."""
    given = dict(kernel_size=3, num_heads=2, dilation=1, border='zeros', scale=1.0)
    weights = [layer.query.weight, layer.key.weight, layer.value.weight]
    tables = layer.rel_row, layer.rel_col
    options = {**given, **changes}.values()
    return torch.ops.sasa_det_cuda.projected_attention(
        x, weights, [None] * 3, *tables, *options, backend, False
    )


def test_auto_takes_only_what_agreed(driver):
    layer, x = make()
    assert call(x, layer, 'auto') is None
    cuda_driver.trust(torch.device('cpu'), VARIANT)
    assert call(x, layer, 'auto') is not None
    assert call(x, layer, 'triton') is None


def test_leaves_the_rest_to_python(driver):
    layer, x = make()
    assert call(x, layer) is not None
    wide, _ = make(torch.float32)
    rest = {
        'contiguous': (x.contiguous(), layer),
        'no pixel': (x[:0], layer),
        'float32': (x.float(), wide),
        'another type': (x.half(), layer),
        'other channels': (x[:, :4].contiguous(memory_format=torch.channels_last), layer),
        'no memory': (x.detach().to('meta'), layer.to('meta')),
    }
    layer, x = make()
    for name, given in rest.items():
        assert call(*given) is None, name
    for changes in (
        dict(scale=-1.0),
        dict(kernel_size=5),
        dict(num_heads=3),
        dict(dilation=0),
        dict(border='mask'),
    ):
        assert call(x, layer, **changes) is None, changes


def test_kernels_belong_to_their_gpu(monkeypatch):
    StubDriver(monkeypatch, LIBRARY)
    layer, x = make()
    for device in (torch.device('cuda', 0), torch.device('cpu')):
        assert call(x, layer) is None
        for kernel in KERNELS:
            cuda_driver.load(device, kernel, VARIANT)
    assert call(x, layer) is not None


def test_a_kernel_is_loaded_at_its_first_use(monkeypatch):
    driver = StubDriver(monkeypatch, LIBRARY)
    layer, x = make()
    for expected in ('_ProjectedAttentionBackward', 'LocalSelfAttentionBackward'):
        y = layer(x)
        assert expected in y.grad_fn.name()
        y.sum().backward()
    assert [each[0] for each in driver.launches] == 2 * list(KERNELS)
    query = torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16)
    assert cuda_driver._loaded.keys() == {
        (query.device, kernel, variant_of(query, query, query, Window(3, 2))) for kernel in KERNELS
    }
