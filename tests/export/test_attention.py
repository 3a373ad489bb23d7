import numpy as np
import pytest
import torch
from cases import Case

from sasa_det.layers import AttentionStem, LocalSelfAttention2d
from sasa_det.ops import local_attention

pytest.importorskip('onnxscript', reason="the extra 'export' is not installed")
onnxruntime = pytest.importorskip('onnxruntime', reason="the extra 'export' is not installed")


class Operator(torch.nn.Module):
    """The operator as a model of its own, of which the log-sum-exp is to be seen too."""

    def __init__(self, stride, **options):
        super().__init__()
        self.stride, self.options = stride, options.values()

    def forward(self, query, key, value, rel_row, rel_col):
        return torch.ops.sasa_det.local_attention(
            query, key, value, rel_row, rel_col, *self.options, 'auto', self.stride
        )


def translated(inputs, case):
    """Export the operator alone, for maps of any size, and run what was written."""
    from sasa_det.export.to_onnx import translate

    inputs = dict(zip(('query', 'key', 'value', 'rel_row', 'rel_col'), inputs))
    there = {name: x for name, x in inputs.items() if x is not None}
    # Followed at another size than it is run at.
    sizes = dict.fromkeys(there, (6, 8))
    sizes['query'] = tuple(-(-n // case.stride) for n in (6, 8))
    example = {
        name: torch.zeros(2, x.shape[1], *sizes[name]) if x.dim() == 4 else x
        for name, x in there.items()
    }
    dims = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    program = torch.export.export(
        Operator(**case.options), (), {**dict.fromkeys(inputs), **example}, strict=False,
        dynamic_shapes={name: dims if name in there and x.dim() == 4 else None
                        for name, x in inputs.items()},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(
        translate(program, list(there), ['output', 'logsumexp'], 18).SerializeToString()
    )
    return session.run(None, {name: x.numpy() for name, x in there.items()})


@pytest.mark.parametrize(
    'case',
    [
        Case(),
        Case(kernel_size=1, positions=None),
        Case(border='mask', dilation=2, size=(5, 4)),
        Case(border='mask', positions=None, scale=1.0),
        Case(key=False, positions='per_head'),
        Case(kernel_size=5, positions='per_head', size=(1, 3), batch=1),
        Case(stride=2, size=(7, 9)),
        Case(stride=3, kernel_size=5, dilation=2, border='mask', size=(8, 10)),
        Case(stride=2, key=False, border='mask', size=(1, 4)),
    ],
    ids=str,
)
def test_operators_compute_the_reference(case):
    inputs = case.inputs(torch.float32)
    expected = local_attention(*inputs, **case.options, backend='reference').numpy()
    output, _ = translated(inputs, case)
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() < 1e-5


LAYERS = [
    AttentionStem(),
    LocalSelfAttention2d(8, kernel_size=3, num_heads=2, dilation=3, stride=2, downsample='query'),
    LocalSelfAttention2d(8, kernel_size=3, num_heads=2, border='mask', stride=3, init='random'),
    LocalSelfAttention2d(8, kernel_size=3, num_heads=2, position='absolute', out_proj=True),
]


@pytest.mark.parametrize('layer', LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize('edge', [16, 19])
def test_layers_compute_the_same_at_any_size(layer, edge):
    from sasa_det.export.to_onnx import translate

    channels = 3 if isinstance(layer, AttentionStem) else 8
    dims = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    layer.eval()
    with torch.no_grad():
        example = (torch.zeros(2, channels, edge, edge + 1),)
        program = torch.export.export(layer, example, dynamic_shapes=(dims,), strict=False)
    session = onnxruntime.InferenceSession(translate(program, ['x'], ['y'], 18).SerializeToString())
    for size in ((1, 20, 24), (2, 13, 17), (3, 16, 18), (1, 1, 1)):
        x = torch.randn(size[0], channels, *size[1:])
        (found,) = session.run(None, {'x': x.numpy()})
        np.testing.assert_allclose(found, layer(x).detach().numpy(), atol=1e-4)


def test_logsumexp_is_the_operators():
    case = Case(border='mask')
    inputs, options = case.inputs(torch.float32), case.options
    stride = options.pop('stride')
    expected = torch.ops.sasa_det.local_attention(*inputs, *options.values(), 'eager', stride)[1]
    assert np.abs(translated(inputs, case)[1] - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize('border', ['zeros', 'mask'])
def test_large_logits_do_not_overflow(border):
    case = Case(border=border, scale=1e4)
    inputs = case.inputs(torch.float32)
    expected = local_attention(*inputs, **case.options, backend='reference').numpy()
    output, _ = translated(inputs, case)
    assert np.abs(output - expected).max() < 1e-3
