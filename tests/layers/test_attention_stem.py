"""The attention stem beside its definition, at any size, and inside SASAResNet."""

import math

import pytest
import torch
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.autograd import gradcheck

from sasa_det.layers import AttentionStem
from sasa_det.layers.attention_stem import BLOCK, VALUES
from sasa_det.models import SASAResNet

STEMS = ('attention', 'attention_plain', 'attention_conv_values')


def make(values='mixtures', **kwargs):
    """A small stem in float64 whose parameters are all away from zero."""
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, num_heads=2, values=values, **kwargs).double()
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return stem


def attend_by_loops(stem, x):
    """The paper's formula, pixel by pixel."""
    batch, _, height, width = x.shape
    out_channels = len(stem.query.weight)
    depth = out_channels // stem.num_heads
    convolved = stem.value(x) if stem.values == 'conv' else None

    def value(b, i, j):
        pixel = x[b, :, i, j]
        if stem.values == 'conv':
            return convolved[b, :, i, j]
        if stem.values == 'plain':
            return stem.value.weight @ pixel
        position = stem.value.row[i % BLOCK] + stem.value.col[j % BLOCK]
        logits = [position @ nu for nu in stem.value.nu]
        total = sum(math.exp(logit) for logit in logits)
        return sum(
            math.exp(logit) / total * (weight @ pixel)
            for logit, weight in zip(logits, stem.value.weight)
        )

    y = torch.zeros(batch, out_channels, height, width, dtype=x.dtype)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                top, left = i // BLOCK * BLOCK, j // BLOCK * BLOCK
                block = [
                    (a, c)
                    for a in range(top, min(top + BLOCK, height))
                    for c in range(left, min(left + BLOCK, width))
                ]
                query = stem.query.weight @ x[b, :, i, j]
                for head in range(stem.num_heads):
                    part = slice(head * depth, (head + 1) * depth)
                    keys = [stem.key.weight @ x[b, :, a, c] for a, c in block]
                    weights = [math.exp(query[part] @ key[part]) for key in keys]
                    for weight, (a, c) in zip(weights, block):
                        y[b, part, i, j] += weight / sum(weights) * value(b, a, c)[part]
    return y


class TestDefinition:
    @torch.no_grad()
    @pytest.mark.parametrize('values', VALUES)
    @pytest.mark.parametrize('size', [(8, 4), (5, 7), (1, 2), (6, 8)])
    def test_attention_is_that_of_the_paper(self, values, size):
        stem = make(values)
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert torch.allclose(stem.attend(x), attend_by_loops(stem, x), rtol=0, atol=1e-12)

    @torch.no_grad()
    def test_norm_relu_and_pool_follow(self):
        x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
        for relu, pool in ((True, 'max'), (False, 'max'), (True, 'avg')):
            stem = make(relu=relu, pool=pool).train()
            y = stem.attend(x)
            # What was padded has no part in the statistics.
            y = (y - y.mean((0, 2, 3), True)) / (y.var((0, 2, 3), False, True) + 1e-5).sqrt()
            y = y * stem.norm.weight[:, None, None] + stem.norm.bias[:, None, None]
            y = y.relu() if relu else y
            over = torch.amax if pool == 'max' else torch.mean
            expected = torch.stack(
                [
                    torch.stack([over(y[:, :, i : i + 4, j : j + 4], (2, 3)) for j in (0, 4, 8)], 2)
                    for i in (0, 4, 8)
                ],
                2,
            )
            assert torch.allclose(stem(x), expected, rtol=0, atol=1e-12)

    @torch.no_grad()
    def test_one_mixture_is_a_plain_projection(self):
        mixed, plain = make(num_mixtures=1), make('plain')
        plain.query, plain.key = mixed.query, mixed.key
        plain.value.weight.copy_(mixed.value.weight[0])
        x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
        assert torch.allclose(mixed.attend(x), plain.attend(x))

    @pytest.mark.parametrize('values', VALUES)
    def test_gradients(self, values):
        stem = make(values).eval()
        x = torch.randn(1, 3, 5, 8, dtype=torch.float64, requires_grad=True)
        parameters = dict(stem.named_parameters())

        def run(x, *tensors):
            return torch.func.functional_call(stem, dict(zip(parameters, tensors)), (x,))

        assert gradcheck(run, (x, *parameters.values()))

    @torch.no_grad()
    @pytest.mark.parametrize('values', VALUES)
    def test_a_change_stays_in_its_block(self, values):
        stem = make(values, value_kernel_size=3)
        x = torch.randn(1, 3, 12, 11, dtype=torch.float64)
        other = x.clone()
        other[:, :, 5, 6] += 1  # in the block of rows and columns 4 to 7, away from its edge
        changed = (stem.attend(x) != stem.attend(other)).any(1)[0]
        inside = torch.zeros(12, 11, dtype=torch.bool)
        inside[4:8, 4:8] = True
        assert torch.equal(changed, inside)
        other = x.clone()
        other[:, :, 4, 4] += 1  # in its corner, from where a convolution reaches three more
        changed = (stem.attend(x) != stem.attend(other)).any(1)[0]
        if values == 'conv':
            inside[:8, :8] = True
        assert torch.equal(changed, inside)

    @torch.no_grad()
    def test_result_does_not_depend_on_the_batch(self):
        stem = make().eval()
        x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
        assert torch.allclose(stem(x)[1:2], stem(x[1:2]), rtol=0, atol=1e-12)
        assert stem(x[:0]).shape == (0, 8, 3, 3)

    @pytest.mark.parametrize(
        'kwargs, message',
        [
            (dict(num_heads=5), 'num_heads must divide out_channels, 64, but is 5'),
            (dict(num_heads=0), 'num_heads must be an integer of at least 1, but is 0'),
            (dict(num_mixtures=1.5), 'num_mixtures must be an integer of at least 1, but is 1.5'),
            (dict(value_kernel_size=4), 'value_kernel_size must be odd, but is 4'),
            (dict(values='mean'), r"values must be one of \('mixtures', .*\), but is 'mean'"),
            (dict(pool='min'), r"pool must be one of \('max', 'avg'\), but is 'min'"),
        ],
    )
    def test_refuses(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            MODELS.build(dict(type='AttentionStem', **kwargs))


@pytest.mark.parametrize('stem', STEMS)
class TestInSASAResNet:
    @pytest.mark.parametrize('size', [(64, 96), (65, 99), (30, 33)])
    def test_ends_where_resnets_stem_ends(self, stem, size):
        ours = SASAResNet(26, stem=stem, base_channels=16, attn_cfg=dict(num_heads=2))
        theirs = ResNet(50, base_channels=16)
        x = torch.randn(1, 3, *size)
        assert [y.shape for y in ours(x)] == [y.shape for y in theirs(x)]
        assert ours.stem(x).shape == theirs.maxpool(theirs.conv1(x)).shape

    def test_is_frozen_as_mmdets(self, stem):
        model = SASAResNet(26, stem=stem, base_channels=16, frozen_stages=0, norm_eval=False)
        model.train()
        assert not any(parameter.requires_grad for parameter in model.stem.parameters())
        assert not model.stem.norm.training and model.layer1[0].bn1.training
        before = model.stem.norm.running_mean.clone()
        model(torch.randn(2, 3, 32, 32))
        assert torch.equal(model.stem.norm.running_mean, before)

        model = SASAResNet(26, stem=stem, base_channels=16, norm_eval=True)
        model.train()
        assert all(parameter.requires_grad for parameter in model.stem.parameters())
        assert not model.stem.norm.training

    def test_every_parameter_learns_also_in_bfloat16(self, stem):
        model = SASAResNet(26, stem=stem, base_channels=16, norm_eval=False)
        model.init_weights()
        for enabled in (False, True):
            model.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
                y = model.stem(torch.randn(2, 3, 33, 34))
                (y * torch.randn_like(y)).sum().backward()
            for name, parameter in model.stem.named_parameters():
                assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name

    def test_a_normalisation_and_stem_cfg_from_the_config(self, stem):
        model = MODELS.build(
            dict(
                type='SASAResNet',
                depth=26,
                stem=stem,
                stem_cfg=dict(num_heads=2, relu=False, pool='avg'),
                stem_channels=8,
                norm_cfg=dict(type='GN', num_groups=4),
                base_channels=16,
            )
        )
        assert model.stem.num_heads == 2 and len(model.stem.query.weight) == 8
        assert isinstance(model.stem.norm, nn.GroupNorm)
        assert isinstance(model.stem.pool, nn.AvgPool2d)

    def test_flops_are_counted(self, stem):
        module = AttentionStem(values=dict(zip(STEMS, VALUES))[stem]).eval()
        size = (32, 48)
        projections = 3 * 64 * 2 + 3 * 64 * (25 if module.values == 'conv' else 1)
        macs = math.prod(size) * (projections + 2 * 16 * 64)
        if module.values == 'mixtures':
            macs += 16 * 6 * 64 + 16 * 6 * 64 * 3  # shares, and the matrices mixed by them
        counted = get_model_complexity_info(module, (3, *size), show_table=False, show_arch=False)
        norm = 2 * 64 * math.prod(size)  # mmengine's estimate
        assert counted['flops'] == macs + norm


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (
            dict(stem='conv', stem_cfg=dict(relu=False)),
            "stem_cfg is for the attention stems, .*'conv'",
        ),
        (dict(stem='attention', deep_stem=True), "deep_stem is for stem='conv', but .*'attention'"),
        (
            dict(stem='attention', stem_cfg=dict(values='plain')),
            "stem_cfg has the unknown key 'values'",
        ),
        (dict(stem='attention', stem_cfg=4), 'stem_cfg must be a dict or None, but is 4'),
        (
            dict(stem='attention', stem_channels=30),
            'num_heads must divide out_channels, 30, but is 4',
        ),
    ],
)
def test_sasaresnet_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='SASAResNet', depth=26, **kwargs))
