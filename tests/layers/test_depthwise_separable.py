"""Depthwise-separable convolutions: their sizes, and how hosts build them."""

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

import sasa_det  # noqa: F401
from sasa_det.layers import DepthwiseSeparableConv2d, build_depthwise_separable

CFG = dict(type='DepthwiseSeparable', window=5)


@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 2)])
def test_it_is_a_dense_convolution_of_fewer_parameters(stride, dilation):
    """Of rank one between window and channels."""
    torch.manual_seed(0)
    layer = DepthwiseSeparableConv2d(6, 8, 5, stride, dilation)
    depthwise, pointwise = (conv.weight for conv in layer)
    weight = pointwise * depthwise[:, 0]
    x = torch.randn(2, 6, 9, 12)
    expected = nn.functional.conv2d(x, weight, None, stride, 2 * dilation, dilation)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert sum(p.numel() for p in layer.parameters()) == 6 * 25 + 6 * 8


def test_hosts_keep_their_pointwise_convolutions():
    assert type(ConvModule(8, 16, 1, conv_cfg=CFG).conv) is nn.Conv2d
    module = ConvModule(8, 16, 3, stride=2, padding=1, conv_cfg=CFG, norm_cfg=dict(type='BN'))
    assert isinstance(module.conv, DepthwiseSeparableConv2d)
    assert module(torch.zeros(1, 8, 9, 12)).shape == (1, 16, 5, 6)


def test_refuses():
    with pytest.raises(ValueError, match='kernel_size must be odd, but is 4'):
        build_depthwise_separable(8, 8, 3, window=4)
    with pytest.raises(ValueError, match='groups must be 1'):
        build_depthwise_separable(8, 8, 3, groups=2)
