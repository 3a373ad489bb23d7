"""The op as torch's own machinery sees it."""

import logging

import pytest
import torch
from cases import CASES, STRIDES, Case, backends, value_and_grads, with_grad
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.ops import available_backends, local_attention

WINDOW = ('kernel_size', 'num_heads', 'dilation', 'border', 'scale')
OP = torch.ops.sasa_det.local_attention.default
fused = backends('eager', 'native')


@fused
@pytest.mark.parametrize('case', CASES[::3], ids=str)
def test_opcheck(case, backend):
    window = tuple(case.options[name] for name in WINDOW)
    torch.library.opcheck(OP, (*with_grad(case.inputs(torch.float32)), *window, backend))


@fused
@pytest.mark.parametrize('case', STRIDES[::3], ids=str)
def test_opcheck_of_a_stride(case, backend):
    window = tuple(case.options[name] for name in WINDOW)
    inputs = with_grad(case.inputs(torch.float32))
    torch.library.opcheck(OP, (*inputs, *window, backend, case.stride))
    torch.library.opcheck(OP, (*inputs, *window, backend), dict(stride=case.stride))


@fused
@pytest.mark.parametrize('key', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_backward_writes_where_it_is_told_to(key, layout, backend):
    """Into slices of one map, the same bits as into maps of their own."""
    case = Case(kernel_size=3, size=(9, 12), key=key)
    query, key, value, row, col = case.inputs(torch.float32)
    window = tuple(case.options[name] for name in WINDOW)
    inputs = (query, key, value, row, col)
    output, logsumexp = torch.ops.sasa_det.local_attention(*inputs, *window, backend)
    expected = torch.ops.sasa_det.local_attention_backward(
        output, *inputs, logsumexp, *window, backend
    )
    batch, channels, *size = query.shape
    maps = torch.full((batch, 4 * channels, *size), 7.0).contiguous(memory_format=layout)
    grads = list(maps.chunk(4, 1)[:3])
    if key is None:
        grads[1] = None
    arguments = (output, *inputs, logsumexp, *grads, *window, backend)
    torch.library.opcheck(torch.ops.sasa_det.local_attention_backward_into.default, arguments)
    tables = torch.ops.sasa_det.local_attention_backward_into(*arguments)
    for result, truth in zip((*grads, *tables), expected):
        assert (truth.numel() == 0) if result is None else torch.equal(result, truth)
    assert (maps[:, 3 * channels :] == 7).all()


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda x: x.bfloat16(), 'grad_value must be .* in torch.float32.*but is .*bfloat16'),
        (lambda x: x[:, :, 1:], 'grad_value must be'),
        (lambda x: None, 'grad_value'),
    ],
)
def test_backward_writes_into_no_other_map(spoil, message):
    case = Case(kernel_size=3, size=(9, 12))
    query, key, value, row, col = case.inputs(torch.float32)
    window = tuple(case.options[name] for name in WINDOW)
    output, logsumexp = torch.ops.sasa_det.local_attention(
        query, key, value, row, col, *window, 'auto'
    )
    grads = [torch.empty_like(query), torch.empty_like(key), spoil(torch.empty_like(value))]
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        torch.ops.sasa_det.local_attention_backward_into(
            output, query, key, value, row, col, logsumexp, *grads, *window, 'auto'
        )


@fused
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_as_one_graph(layout, backend):
    case = Case(kernel_size=5, size=(9, 12))
    inputs = case.inputs(torch.float32)
    inputs[:3] = (x.contiguous(memory_format=layout) for x in inputs[:3])

    def attend(*tensors):
        return local_attention(*tensors, **case.options, backend=backend).relu()

    compiled = torch.compile(attend, fullgraph=True, backend='aot_eager')
    leaves, others = with_grad(inputs), with_grad(inputs)
    output, expected = compiled(*leaves), attend(*others)
    assert torch.equal(output, expected)
    for grad, wanted in zip(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(expected.sum(), others)
    ):
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize('dynamic', [True, None])
def test_compiles_as_one_graph_for_any_scale(dynamic):
    case = Case(kernel_size=3, size=(9, 12))
    inputs = case.inputs(torch.float32)

    def attend(scale):
        return local_attention(*inputs, **{**case.options, 'scale': scale})

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend='aot_eager', dynamic=dynamic)
    for scale in (1.0, 0.5, 0.25):
        assert torch.equal(compiled(scale), attend(scale))
    for scale in (float('inf'), float('nan')):
        with pytest.raises(ValueError, match='scale must be a finite number'):
            attend(scale)


def test_symbolic_traces_have_the_operator_as_one_call():
    case = Case(kernel_size=3, size=(9, 12))

    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return local_attention(query, key, value, kernel_size=3, num_heads=2).relu()

    traced = torch.fx.symbolic_trace(Attend())
    assert local_attention in {node.target for node in traced.graph.nodes}
    inputs = case.inputs(torch.float32)[:3]
    assert torch.equal(traced(*inputs), Attend()(*inputs))


def test_exports():
    case = Case(size=(9, 12))

    class Attend(torch.nn.Module):
        def forward(self, q, k, v, row, col):
            return local_attention(q, k, v, row, col, **case.options)

    inputs = tuple(case.inputs(torch.float32))
    program = torch.export.export(Attend(), inputs)
    assert torch.equal(program.module()(*inputs), Attend()(*inputs))
    assert 'sasa_det.local_attention' in str(program.graph)


@fused
def test_autocast_computes_in_its_type(backend):
    case = Case(size=(9, 12))
    inputs = case.inputs(torch.float32)
    inputs[0] = inputs[0].bfloat16()  # as a convolution before it would give
    leaves = with_grad(inputs)
    with torch.autocast('cpu', torch.bfloat16):
        output = local_attention(*leaves, **case.options, backend=backend)
    assert output.dtype == torch.bfloat16
    low = [x.bfloat16() for x in inputs]
    assert torch.equal(output, local_attention(*low, **case.options, backend=backend))
    output.sum().backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in inputs]


def test_types_must_agree_outside_autocast():
    query, key, value, row, col = Case().inputs(torch.float32)
    with pytest.raises(TypeError, match='rel_row is torch.float64.*torch.float32'):
        local_attention(query, key, value, row.double(), col, **Case().options)


def test_flops_of_the_formula():
    """Two a multiply-add: q.k and the values k * k a channel and pixel each, q.r only k."""
    case = Case(kernel_size=7, num_heads=2, depth=8, size=(10, 12), batch=1)
    pixels_channels = 10 * 12 * 16
    for key, positions, expected in (
        (True, 'shared', 2 * 49 + 7),
        (True, None, 2 * 49),
        (False, 'per_head', 49 + 7),
    ):
        variant = Case(**{**vars(case), 'key': key, 'positions': positions})
        with FlopCounterMode(display=False) as counter:
            local_attention(*variant.inputs(torch.float32), **variant.options)
        assert counter.get_total_flops() == 2 * expected * pixels_channels


def test_flops_of_the_backward_are_counted():
    case = Case(kernel_size=3, size=(10, 12))
    with FlopCounterMode(display=False) as counter:
        value_and_grads(case.inputs(torch.float32), case.options, 'eager')
    counts = counter.get_flop_counts()['Global']
    forward = counts[torch.ops.sasa_det.local_attention]
    backward = counts[torch.ops.sasa_det.local_attention_backward]
    # Recomputed logits (9 + 3), then twice each product (9 + 3 for logits, 9 for values).
    assert backward * (9 + 9 + 3) == forward * (3 * (9 + 3) + 2 * 9)


def test_saves_nothing_for_backward_in_inference():
    case = Case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            local_attention(*with_grad(case.inputs()), **case.options)
    assert not saved


def test_saves_no_window_for_backward():
    """Inputs and one number a head and pixel, and nothing of the size of k * k."""
    case = Case(kernel_size=7, num_heads=2, depth=8, size=(16, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        inputs = with_grad(case.inputs(torch.float32))
        output = local_attention(*inputs, **case.options)
    extra = sum(x.numel() for x in saved) - sum(x.numel() for x in inputs)
    assert output.grad_fn is not None and extra == 2 * 2 * 16 * 16


@fused
def test_a_trace_computes_where_its_input_is(backend):
    query = torch.randn(1, 8, 5, 6)

    def attend(query):
        return local_attention(query, query, query, kernel_size=3, num_heads=2, backend=backend)

    traced = torch.jit.trace(attend, query)
    # A trace calls the operator from C++, where nothing takes torch.device off.
    with torch.inference_mode(), torch.device('meta'):
        result = traced(query)
    torch.testing.assert_close(result, attend(query))


@pytest.fixture
def python_refuses(monkeypatch):
    """Let the native kernels be reached in any way but through Python."""

    def refuse(*args):
        raise AssertionError('went through Python')

    monkeypatch.setattr('sasa_det.ops.backends.native.forward', refuse)
    monkeypatch.setattr('sasa_det.ops.backends.native.backward', refuse)


@pytest.mark.skipif(available_backends()['native'] is not None, reason='no native kernels here')
@pytest.mark.parametrize('backend', ['auto', 'native'])
def test_dispatcher_reaches_the_cpus_kernels_itself(backend, python_refuses, caplog):
    case = Case(kernel_size=3, size=(9, 12))
    inputs = with_grad(case.inputs(torch.float32))
    local_attention(*inputs, **case.options, backend=backend).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in inputs)
    # What is to be said is Python's to say.
    with caplog.at_level(logging.DEBUG, logger='sasa_det'):
        if backend == 'auto':
            with pytest.raises(AssertionError, match='went through Python'):
                local_attention(*inputs, **case.options, backend=backend)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
@pytest.mark.parametrize('which', [1, 2, 3])
def test_op_refuses_other_types(which, dtype):
    case = Case(kernel_size=3, size=(9, 12))
    inputs = case.inputs(torch.float32)
    window = tuple(case.options[name] for name in WINDOW)
    output, logsumexp = OP(*inputs, *window, 'auto')
    inputs[which] = inputs[which].to(dtype)
    message = f'is {dtype}, and must be of the type of query, torch.float32'
    with pytest.raises(TypeError, match=message):
        OP(*inputs, *window, 'auto')
    with pytest.raises(TypeError, match=message):
        torch.ops.sasa_det.local_attention_backward(output, *inputs, logsumexp, *window, 'auto')
