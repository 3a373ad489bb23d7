"""Numbers that nobody wants: the results are defined, and the same ones in all backends."""

import pytest
import torch
from cases import Case, backends, value_and_grads

from sasa_det.ops import local_attention

fused = backends('eager', 'native')
CASES = [
    Case(border=border, positions=positions, dilation=dilation, kernel_size=5, size=(9, 20))
    for border, positions, dilation in (
        ('zeros', 'shared', 1),
        ('mask', 'per_head', 1),
        ('mask', None, 2),
    )
]


@fused
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_large_logits(case, dtype, backend):
    """Logits of some 10,000 in size: one neighbour takes all, and nothing overflows."""
    query, key, *others = case.inputs()
    inputs = [query * 100, key * 100, *others]
    exact = value_and_grads(inputs, case.options, 'reference')
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    results = value_and_grads(inputs, case.options, backend)
    # A logit's rounding moves its weight by as much, and a gradient by that times a query or a key.
    tolerance = 1e4 * torch.finfo(dtype).eps
    for result, truth, size in zip(results, exact, [1, *(query.abs().max() * 100 for _ in exact)]):
        error = (result - truth).double().square().mean().sqrt()
        assert error <= tolerance * size


@backends('reference', 'eager', 'native')
@pytest.mark.parametrize('level', [0.0, 3.0, -50.0])
def test_equal_logits_give_the_mean(level, backend):
    value = torch.randn(1, 4, 6, 20, dtype=torch.float64)
    query = torch.full_like(value, level)
    output = local_attention(
        query, torch.ones_like(value), value, kernel_size=3, num_heads=2, border='mask',
        backend=backend,
    )  # fmt: skip
    mean = torch.nn.functional.avg_pool2d(value, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(output, mean)


@backends('reference', 'eager', 'native')
def test_one_pixel_sees_itself_alone(backend):
    """Of a masked window only the centre may be left, and it takes all, whatever its logit."""
    value = torch.randn(1, 4, 1, 1)
    for level in (0.0, 1e4, -1e4):
        query = torch.full_like(value, level)
        output = local_attention(
            query, torch.ones_like(value), value, kernel_size=7, num_heads=2, border='mask',
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(output, value)


@fused
@pytest.mark.parametrize('number', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('which', range(3), ids=('query', 'key', 'value'))
@pytest.mark.parametrize('case', CASES, ids=str)
def test_what_is_not_finite_shows(case, which, number, backend):
    """Never is a result finite that is not so by the formula; and the next image is as it was."""
    inputs = case.inputs()
    before = value_and_grads(inputs, case.options, backend)
    inputs[which][0, 1, 4, 10] = number
    expected = value_and_grads(inputs, case.options, 'reference')
    results = value_and_grads(inputs, case.options, backend)
    for result, truth, clean in zip(results, expected, before):
        assert not (result.isfinite() & ~truth.isfinite()).any()
        if (
            backend == 'native'
        ):  # eager multiplies whole tiles, with weights of zero between windows
            assert torch.equal(result.isfinite(), truth.isfinite())
        if result.dim() == 4:  # not the tables' gradients, which are sums over all images
            assert torch.equal(result[1], clean[1])


@fused
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('negative', [False, True])
def test_no_bits_of_a_nan_make_it_finite(negative, dtype, backend):
    """GPUs write NaN with all bits set, to which an exponent can be added that makes it a number."""
    query, key, value = torch.randn(3, 1, 8, 9, 20, dtype=dtype).unbind()
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    key[0, 1, 4, 10].view(integer).fill_(-1 if negative else torch.iinfo(integer).max)
    output = local_attention(query, key, value, kernel_size=3, num_heads=2, backend=backend)
    assert not output[0, :4, 3:6, 9:12].isfinite().any()
    assert output[0, 4:].isfinite().all()
