import numpy as np
import pytest
import torch
from cases import Case

from sasa_det.ops import local_attention

pytest.importorskip('onnxscript', reason="the extra 'export' is not installed")
onnxruntime = pytest.importorskip('onnxruntime', reason="the extra 'export' is not installed")


class Operator(torch.nn.Module):
    """The operator as a model of its own, of which the log-sum-exp is to be seen too."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value, rel_row, rel_col):
        return torch.ops.sasa_det.local_attention(
            query, key, value, rel_row, rel_col, *self.options.values(), 'auto'
        )


def translated(inputs, case):
    """Export the operator alone, for maps of any size, and run what was written."""
    from sasa_det.export.to_onnx import translate

    inputs = dict(zip(('query', 'key', 'value', 'rel_row', 'rel_col'), inputs))
    there = {name: x for name, x in inputs.items() if x is not None}
    # Followed at another size than it is run at.
    example = {
        name: torch.zeros(2, x.shape[1], 6, 8) if x.dim() == 4 else x for name, x in there.items()
    }
    dims = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    program = torch.export.export(
        Operator(case.options), (), {**dict.fromkeys(inputs), **example}, strict=False,
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
    ],
    ids=str,
)
def test_operators_compute_the_reference(case):
    inputs = case.inputs(torch.float32)
    expected = local_attention(*inputs, **case.options, backend='reference').numpy()
    output, _ = translated(inputs, case)
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() < 1e-5


def test_logsumexp_is_the_operators():
    case = Case(border='mask')
    inputs = case.inputs(torch.float32)
    expected = torch.ops.sasa_det.local_attention(*inputs, *case.options.values(), 'eager')[1]
    assert np.abs(translated(inputs, case)[1] - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize('border', ['zeros', 'mask'])
def test_large_logits_do_not_overflow(border):
    case = Case(border=border, scale=1e4)
    inputs = case.inputs(torch.float32)
    expected = local_attention(*inputs, **case.options, backend='reference').numpy()
    output, _ = translated(inputs, case)
    assert np.abs(output - expected).max() < 1e-3
