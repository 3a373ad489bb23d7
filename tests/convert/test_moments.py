"""Moments of neighbours and targets, beside the same from explicitly unfolded features."""

import pytest
import torch
import torch.nn.functional as F

from sasa_det.convert.fit import least_squares_error
from sasa_det.convert.moments import Moments, gather


def unfolded(x, stride, dilation):
    """All neighbourhoods (P, 9 C), one neighbour after the other."""
    columns = F.unfold(x, 3, dilation=dilation, padding=dilation, stride=stride)
    return columns.unflatten(1, (-1, 9)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize('size', [(9, 12), (1, 5)])
def test_gathers_what_unfold_does(size, stride, dilation):
    x = torch.randn(2, 5, *size)
    out = tuple(-(-edge // stride) for edge in size)
    pixels = torch.arange(2 * out[0] * out[1])
    assert torch.equal(gather(x, pixels, out, stride, dilation), unfolded(x, stride, dilation))


@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 2)])
def test_covariance_is_that_of_the_unfolded_features(stride, dilation):
    generator = torch.Generator().manual_seed(0)
    moments, inputs, targets = Moments(6, 4, stride, dilation), [], []
    for size in ((9, 12), (5, 7)):  # as levels of a pyramid
        x = torch.randn(3, 6, *size, generator=generator) + 2
        out = tuple(-(-edge // stride) for edge in size)
        y = torch.randn(3, 4, *out, generator=generator) - 1
        moments.add(x, y)
        inputs.append(unfolded(x, stride, dilation))
        targets.append(y.permute(0, 2, 3, 1).flatten(0, 2))
    inputs, targets = torch.cat(inputs).double(), torch.cat(targets).double()
    found = moments.covariance()
    expected = torch.cov(torch.cat([inputs, targets], 1).T, correction=0)
    assert found.samples == len(inputs)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.inputs.double(), expected[:54, :54], **close)
    torch.testing.assert_close(found.cross.double(), expected[:54, 54:], **close)
    torch.testing.assert_close(found.target.double(), expected[54:, 54:].diagonal(), **close)
    torch.testing.assert_close(found.input_mean.double(), inputs.mean(0), **close)


def test_a_large_mean_does_not_drown_the_covariance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 24, 24, generator=generator) + 3000
    y = torch.randn(4, 3, 24, 24, generator=generator) - 3000
    moments = Moments(6, 3, offsets=((0, 0),))
    moments.add(x, y)
    both = torch.cat([x, y], 1).double().transpose(0, 1).flatten(1)
    expected = torch.cov(both, correction=0)
    found = moments.covariance()
    close = dict(rtol=0, atol=1e-3)
    torch.testing.assert_close(found.inputs.double(), expected[:6, :6], **close)
    torch.testing.assert_close(found.cross.double(), expected[:6, 6:], **close)
    torch.testing.assert_close(found.target.double(), expected[6:, 6:].diagonal(), **close)
    torch.testing.assert_close(found.target_mean.double(), both[6:].mean(1), rtol=1e-6, atol=0)


def test_error_is_that_of_direct_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 10, 12, generator=generator)
    weight = torch.randn(4, 6, 3, 3, generator=generator)
    y = F.conv2d(x, weight, padding=1) + 3 * torch.randn(8, 4, 10, 12, generator=generator)
    moments = Moments(6, 4)
    moments.add(x, y)
    features = unfolded(x, 1, 1).double()
    targets = y.permute(0, 2, 3, 1).flatten(0, 2).double()
    features, targets = features - features.mean(0), targets - targets.mean(0)
    left = targets - features @ torch.linalg.lstsq(features, targets).solution
    expected = (left.square().sum() / targets.square().sum()).item()
    assert 0.05 < expected < 0.5
    assert least_squares_error(moments.covariance()) == pytest.approx(expected, abs=1e-4)


def test_a_share_of_the_pixels_is_drawn_by_the_generator():
    x, y = torch.randn(2, 3, 20, 20), torch.randn(2, 5, 20, 20)

    def draw(seed):
        moments = Moments(3, 5)
        moments.add(x, y, 0.25, torch.Generator().manual_seed(seed))
        return moments.covariance()

    first, again, other = draw(0), draw(0), draw(1)
    assert first.samples == 200
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)


def test_without_pixels_there_are_no_moments():
    with pytest.raises(ValueError, match='only once pixels were added'):
        Moments(3, 5).covariance()
