"""The Triton kernels on a GPU."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    Case,
    assert_within_the_error_of_plain_pytorch,
    largest_error,
    strided,
    value_and_grads,
    with_grad,
)  # fmt: skip
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import available_backends, local_attention
from sasa_det.ops.backends.triton import refuse
from sasa_det.ops.window import Window

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or available_backends()['triton'] is not None,
    reason='needs a GPU that the Triton kernels take',
)

DEPTHS = [Case(kernel_size=7, depth=depth, size=(20, 33)) for depth in (8, 16, 32, 40, 64, 128)]
WINDOWS = [Case(kernel_size=k, depth=16, size=(19, 37), border='mask') for k in (3, 15, 31)]
P3 = replace(Case(), kernel_size=7, num_heads=8, depth=32, batch=1, size=(100, 168))


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """By default cuDNN's convolutions, which project, round their factors to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def on_gpu(inputs):
    return [None if x is None else x.cuda() for x in inputs]


def random_maps(shape, dtype, layout=torch.contiguous_format):
    generator = torch.Generator('cuda').manual_seed(0)
    return [
        torch.randn(shape, dtype=dtype, device='cuda', generator=generator)
        .contiguous(memory_format=layout)
        .requires_grad_()
        for _ in range(3)
    ]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', [case for case in CASES if case.batch] + DEPTHS + WINDOWS, ids=str)
def test_within_the_error_of_plain_pytorch(case, dtype):
    assert_within_the_error_of_plain_pytorch(case, dtype, 'triton', device='cuda')


@pytest.mark.parametrize(
    'how',
    ['channels_last', 'slice_of_fused', 'slice_of_fused_channels_last', 'transposed', 'every_other',
     'expanded'],
)  # fmt: skip
@pytest.mark.parametrize('depth', [4, 32])
def test_layout_does_not_change_the_result(how, depth):
    case = Case(kernel_size=5, size=(9, 21), depth=depth)
    *maps, row, col = on_gpu(case.inputs(torch.float32))
    maps = [strided(x, how) for x in maps]
    expected = value_and_grads([*(x.contiguous() for x in maps), row, col], case.options, 'triton')
    leaves = [x.detach().requires_grad_() for x in maps]
    output = local_attention(*leaves, row, col, **case.options, backend='triton')
    assert largest_error([output.detach()], expected[:1]) < 1e-5
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(output, leaves, cotangent.to(output))
    assert largest_error(grads, expected[1:4]) < 1e-5


def test_an_empty_batch():
    case = Case(batch=0)
    leaves = with_grad(on_gpu(case.inputs(torch.float32)))
    output = local_attention(*leaves, **case.options, backend='triton')
    grads = torch.autograd.grad(output.sum(), leaves)
    assert output.shape == (0, 8, 6, 7) and not grads[3].any() and not grads[4].any()


def test_auto_takes_it_for_what_it_supports():
    query = torch.zeros(1, 8, 5, 6, device='cuda')
    assert refuse(query, Window(7, 2)) is None
    assert 'torch.float64' in refuse(query.double(), Window(7, 2))
    q, k, v, row, col = on_gpu(Case().inputs())
    exact = local_attention(q, k, v, row, col, **Case().options)
    truth = local_attention(q, k, v, row, col, **Case().options, backend='reference')
    assert largest_error([exact], [truth]) < 1e-10


def test_the_same_bits_every_time():
    inputs = on_gpu(P3.inputs(torch.bfloat16))
    first, second = (value_and_grads(inputs, P3.options, 'triton') for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_autocast_and_grad_scaler():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(64, kernel_size=7, num_heads=4, backend='triton').cuda()
    peer = LocalSelfAttention2d(64, kernel_size=7, num_heads=4, backend='reference').cuda()
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64, 21, 34, device='cuda')
    for each in (layer, peer):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler('cuda', init_scale=2.0**10)
        with torch.autocast('cuda', torch.float16):
            output = each(x)
            assert output.dtype == torch.float16
            loss = output.float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10  # nothing overflowed
    for a, b in zip(layer.parameters(), peer.parameters()):
        assert (a.grad - b.grad).norm() <= 0.02 * b.grad.norm()  # unscaled by the step


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_as_one_graph(layout):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(32, kernel_size=7, num_heads=4, backend='triton').cuda()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 32, 21, 34, device='cuda').contiguous(memory_format=layout)
    for each in (compiled, layer):
        layer.zero_grad()
        each(x).square().mean().backward()
        grads = [parameter.grad.clone() for parameter in layer.parameters()]
        if each is compiled:
            expected = grads
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_is_captured_in_a_cuda_graph():
    leaves = with_grad(on_gpu(P3.inputs(torch.bfloat16)))

    def step():
        output = local_attention(*leaves, **P3.options, backend='triton')
        return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_activation_checkpointing_gives_the_same_gradients():
    def attend(*tensors):
        return local_attention(*tensors, **P3.options, backend='triton')

    leaves = with_grad(on_gpu(P3.inputs(torch.bfloat16)))
    others = with_grad(leaves)
    checkpoint(attend, *leaves, use_reentrant=False).float().square().sum().backward()
    attend(*others).float().square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, others))


def test_extra_memory_is_at_most_twice_the_input():
    """Beside the output and the gradients, which any operator has."""
    leaves = random_maps((1, 256, 100, 168), torch.bfloat16, torch.channels_last)
    tables = on_gpu(P3.inputs(torch.bfloat16)[3:])
    inputs = [*leaves, *(x.requires_grad_() for x in tables)]
    grad = torch.ones_like(leaves[0])
    for _ in range(2):  # the first time loads the kernels
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = local_attention(*inputs, **P3.options, backend='triton')
        grads = torch.autograd.grad(output, inputs, grad)
        peak = torch.cuda.max_memory_allocated() - before
        results = sum(x.nbytes for x in (output, *grads))
        del output, grads
    assert peak - results <= 2 * leaves[0].nbytes


# The place of a head in 64 bits, and then the place in a head as well.
@pytest.mark.parametrize(
    'shape, layout',
    [((5, 256, 1344, 1344), torch.contiguous_format), ((1, 256, 3000, 3000), torch.channels_last)],
    ids=str,
)
def test_more_than_two_to_the_31_elements(shape, layout):
    needed = 6 * 2 * torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f'needs {needed >> 30} GiB of free GPU memory')
    x = torch.empty(shape, dtype=torch.bfloat16, device='cuda', memory_format=layout)
    x.normal_(generator=torch.Generator('cuda').manual_seed(0))
    options = dict(kernel_size=3, num_heads=8, backend='triton')
    output, logsumexp = torch.ops.sasa_det.local_attention(
        x, x, x, None, None, 3, 8, 1, 'zeros', 1.0, 'triton'
    )
    last = x[-1:, :, -40:, -40:].contiguous(memory_format=layout)
    leaves = [last.clone().requires_grad_() for _ in range(3)]
    alone = local_attention(*leaves, **options)
    expected = torch.autograd.grad(alone, leaves, last)
    del leaves
    # Another place in a tile, so that sums are taken in another order.
    assert differ(output[-1:, :, -30:, -30:], alone[..., -30:, -30:]) < 0.01
    del output
    grads = torch.ops.sasa_det.local_attention_backward(
        x, x, x, x, None, None, logsumexp, 3, 8, 1, 'zeros', 1.0, 'triton'
    )
    for a, b in zip(grads, expected):
        assert differ(a[-1:, :, -20:, -20:], b[..., -20:, -20:]) < 0.02


def differ(result, expected):
    """The norm of the difference in the expected one's."""
    return ((result - expected).float().norm() / expected.float().norm()).item()


def test_another_image_size_compiles_nothing_anew(monkeypatch, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    # Compiled in no other test.
    layer = LocalSelfAttention2d(36, kernel_size=9, num_heads=3, backend='triton').cuda()
    compiled = []
    for shape in (1, 36, 40, 56), (2, 36, 41, 57), (4, 36, 25, 13), (1, 36, 96, 128):
        layer(torch.randn(shape, device='cuda')).sum().backward()
        compiled.append(len(list(tmp_path.rglob('*.cubin'))))
    assert compiled == [3] * 4


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_layer_keeps_the_layout(layout):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(64, kernel_size=7, num_heads=4, backend='triton').cuda()
    peer = LocalSelfAttention2d(64, kernel_size=7, num_heads=4, backend='reference').cuda()
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64, 21, 34, device='cuda').contiguous(memory_format=layout)
    grads = []
    for each in (layer, peer):
        leaf = x.clone().requires_grad_()
        output = each(leaf)
        output.square().sum().backward()
        grads.append([output.detach(), leaf.grad, *(p.grad for p in each.parameters())])
        if each is layer:
            assert output.is_contiguous(memory_format=layout)
            assert leaf.grad.is_contiguous(memory_format=layout)
    assert all(differ(a, b) < 1e-4 for a, b in zip(*grads))


def test_distributed_data_parallel(tmp_path):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(32, kernel_size=7, num_heads=4, backend='triton').cuda()
    alone = copy.deepcopy(layer)
    torch.cuda.set_device(0)
    distributed.init_process_group('nccl', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(layer, device_ids=[0])
        with warnings.catch_warnings():
            warnings.filterwarnings(
                'error', message='.*[Ss]trides'
            )  # of a gradient, which DDP copies
            for _ in range(2):
                x = torch.randn(2, 32, 21, 34, device='cuda')
                for each in (parallel, alone):
                    each.zero_grad()
                    each(x).square().mean().backward()
        assert all(
            torch.equal(a.grad, b.grad) for a, b in zip(layer.parameters(), alone.parameters())
        )
    finally:
        distributed.destroy_process_group()
