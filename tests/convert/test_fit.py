"""Static attention in the place of convolutions: which ones it can equal, and how it is written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sasa_det.convert.conversion import convert
from sasa_det.convert.fit import StaticAttention, fit_static_attention
from sasa_det.convert.layers import choose_layers, write_static_attention
from sasa_det.convert.moments import NINE, Moments
from sasa_det.layers.replace import replacement


def smooth(batch, channels, size, seed=0):
    """Maps whose neighbours are alike, as those of images are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *(-(-edge // 2) for edge in size), generator=generator)
    return F.interpolate(x, size=size, mode='bicubic')


def covariance(conv, x):
    moments = Moments(conv.in_channels, conv.out_channels, conv.stride[0], conv.dilation[0])
    with torch.no_grad():
        moments.add(x, conv(x))
    return moments.covariance()


def shifts(channels, heads, seed=0):
    """A convolution that a head per block of channels can equal: each sees one neighbour."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    depth = channels // heads
    with torch.no_grad():
        conv.weight.zero_()
        for head in range(heads):
            row, col = NINE[head % 9]
            value = torch.randn(depth, channels, generator=generator)
            mix = torch.randn(channels, depth, generator=generator)
            conv.weight[:, :, 1 + row, 1 + col] += mix @ value / channels**0.5
    return conv


@pytest.mark.parametrize('depth', [2, 8])
def test_finds_a_convolution_that_attention_can_equal(depth):
    conv = shifts(8 * depth, 8)
    x = smooth(6, 8 * depth, (24, 24))
    fitted = fit_static_attention(covariance(conv, x), conv.weight, 8, depth, 3)
    assert fitted.unexplained < 0.01
    # A head's own neighbour has nearly all weight there, in windows of 3.
    best = (fitted.rows.softmax(1).amax(1) * fitted.cols.softmax(1).amax(1)).median()
    assert best > 0.9


def test_more_heads_leave_less():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1)
    moments = covariance(conv, smooth(6, 32, (24, 24)))
    left = [
        fit_static_attention(moments, conv.weight, heads, 32 // heads, 5).unexplained
        for heads in (2, 4, 8)
    ]
    assert left[0] > left[1] > left[2] > 0
    assert left[2] < 0.35


@pytest.mark.parametrize(
    'conv',
    [
        dict(),
        dict(stride=2),
        dict(dilation=2, padding=2),
        dict(out_channels=64),
        dict(out_channels=30),  # as in a predictor
    ],
    ids=str,
)
@pytest.mark.parametrize('channels', [16, 64], ids='{} channels'.format)
@pytest.mark.parametrize('static, expansion', [(False, 1), (True, 2)])
def test_the_layer_computes_what_was_fitted(channels, conv, static, expansion):
    """Its own attention beside the static kernel that the fit describes."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, **{'out_channels': channels, 'kernel_size': 3, 'padding': 1, **conv})
    x = smooth(4, channels, (15, 20))
    choice = choose_layers(nn.Sequential(conv), 8, 5, static=static, expansion=expansion)['0']
    layer = replacement(conv, choice.attn_cfg).eval()
    heads, depth = layer.num_heads, layer.hidden_channels // layer.num_heads
    fitted = fit_static_attention(covariance(conv, x), conv.weight, heads, depth, 5)
    write_static_attention(layer, fitted)
    patterns = fitted.rows.softmax(1)[:, :, None] * fitted.cols.softmax(1)[:, None]
    kernel = torch.einsum('hij,hcd,hdo->ocij', patterns, fitted.value, fitted.output)
    dilation = conv.dilation[0]
    expected = F.conv2d(
        x, kernel, fitted.bias, conv.stride, padding=2 * dilation, dilation=dilation
    )
    with torch.no_grad():
        result = layer(x)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
        # And that is near what the convolution computes.
        truth = conv(x)
        left = (result - truth).var((0, 2, 3)) / truth.var((0, 2, 3))
    assert left.mean().item() == pytest.approx(fitted.unexplained, abs=0.03)
    assert left.mean() < 0.6


@pytest.mark.parametrize('shared', [False, True])
def test_heads_look_where_they_are_pointed(shared):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    layer = replacement(
        conv,
        dict(kernel_size=5, num_heads=8, bias=True, out_proj=True, position_per_head=not shared),
    )
    rows, cols = 3 * torch.randn(2, 8, 5, generator=generator)
    values = torch.randn(8, 64, 8), torch.randn(8, 8, 64), torch.randn(64)
    write_static_attention(layer, StaticAttention(rows, cols, *values, 0.0))
    points = torch.tensor([[4, 5], [0, 0]])
    weights = layer.attention_weights(torch.randn(1, 64, 9, 9), points)
    expected = rows.softmax(1)[:, :, None] * cols.softmax(1)[:, None]
    for weight in weights:
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)
    # From here queries and keys can learn.
    layer(torch.randn(1, 64, 9, 9)).square().sum().backward()
    assert layer.key.weight.grad.any() and layer.query.weight.grad.any()


def test_few_pixels_fall_back_on_the_convolutions_own_weights():
    """With fewer pixels than inputs, other images are met as well as with many."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    few, many, others = (smooth(n, 64, (8, 8), seed) for n, seed in ((2, 1), (60, 2), (20, 3)))

    def left(images):
        fitted = fit_static_attention(covariance(conv, images), conv.weight, 8, 8, 5)
        layer = replacement(conv, dict(kernel_size=5, num_heads=8, bias=True, out_proj=True))
        write_static_attention(layer, fitted)
        with torch.no_grad():
            truth = conv(others)
            return ((layer(others) - truth).var((0, 2, 3)) / truth.var((0, 2, 3))).mean().item()

    # From the moments of the few alone 1.3 would be left, more than zeros leave.
    assert left(few) < 0.6
    assert left(many) < 0.35


def test_channels_that_are_zero_on_these_images_get_no_large_weights():
    """Other images may use them, and meet weights that nothing was known of."""
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1)
    few, others = smooth(6, 32, (8, 8), 1), smooth(20, 32, (8, 8), 2)
    few[:, :28] = 0.0
    fitted = fit_static_attention(covariance(conv, few), conv.weight, 4, 8, 3)
    layer = replacement(conv, dict(kernel_size=3, num_heads=4, bias=True, out_proj=True))
    write_static_attention(layer, fitted)
    with torch.no_grad():
        truth = conv(others)
        left = (layer(others) - truth).var((0, 2, 3)) / truth.var((0, 2, 3))
    # Zeros would leave 1.
    assert left.mean() < 0.8


def test_what_stays_a_convolution_is_told_why():
    model = nn.ModuleDict(
        dict(
            stem=nn.Conv2d(3, 16, 7, padding=3),
            image=nn.Conv2d(3, 16, 3, padding=1),
            grouped=nn.Conv2d(16, 16, 3, padding=1, groups=16),
            valid=nn.Conv2d(16, 16, 3),
            mirrored=nn.Conv2d(16, 16, 3, padding=1, padding_mode='reflect'),
            oblong=nn.Conv2d(16, 16, 3, padding=1, stride=(1, 2)),
            odd=nn.Conv2d(15, 15, 3, padding=1),
            plain=nn.Conv2d(16, 16, 3, padding=1, stride=2),
            predictor=nn.Conv2d(16, 9, 3, padding=1),
            pointwise=nn.Conv2d(16, 16, 1),
        )
    )
    found = choose_layers(model)
    assert 'pointwise' not in found
    reasons = {name: choice.reason for name, choice in found.items() if choice.attn_cfg is None}
    assert reasons == dict(
        stem='its kernel is 7 x 7',
        image='its input has 3 channels',
        grouped='it has 16 groups',
        valid='its padding is (0, 0)',
        mirrored='it pads by reflect',
        oblong='its stride is (1, 2)',
        odd='15 channels are odd',
    )
    common = dict(kernel_size=5, num_heads=8, bias=True, out_proj=True, position_per_head=True)
    assert found['plain'].attn_cfg == dict(common, downsample='query')
    assert found['predictor'].attn_cfg == dict(common, hidden_channels=16)
    static = choose_layers(model, static=True, expansion=3)
    more = dict(hidden_channels=48, logits='qr', constant_query=True)
    assert static['plain'].attn_cfg == dict(common, **more, downsample='query')
    assert static['predictor'].attn_cfg == dict(common, **more)
    only = choose_layers(model, layers=['pl*'])
    assert [name for name, choice in only.items() if choice.attn_cfg] == ['plain']
    assert only['predictor'].reason == 'it was not asked for'


@pytest.mark.parametrize('heads, expansion', [(1, 2), (2, 4), (8, 12), (4, 2)])
def test_no_channel_of_an_expansion_is_idle(heads, expansion):
    """Values and output weights that are both zero would have no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1))
    (layer,) = convert(
        model, smooth(8, 16, (12, 16)), num_heads=heads, static=True, expansion=expansion
    ).model
    assert layer.hidden_channels == min(32 * expansion, 16 * min(heads, 9))
    assert (
        layer.value.weight.abs().sum(1).min() > 0 and layer.out_proj.weight.abs().sum(0).min() > 0
    )


@pytest.mark.parametrize('channels, heads', [(32, 4), (48, 6), (24, 6), (10, 5)])
def test_has_as_many_of_six_heads_as_divide_the_channels(channels, heads):
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
    assert choose_layers(model, 6)['0'].attn_cfg['num_heads'] == heads


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(kernel_size=4), 'kernel_size must be an odd integer of at least 3, but is 4'),
        (dict(kernel_size=1), 'kernel_size must be an odd integer of at least 3, but is 1'),
        (dict(num_heads=0), 'num_heads must be an integer of at least 1, but is 0'),
        (dict(layers=['neck.*']), r"'neck.\*' matches no spatial convolution; there are 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(nn.Sequential(nn.Conv2d(16, 16, 3)), **options)
