"""Costs against sums by hand, and ours beside mmengine's in tests/test_configs.py."""

import pytest
import torch
from torch import nn

from sasa_det.evaluation.costs import Costs, count_costs
from sasa_det.layers import AttentionStem, LocalSelfAttention2d


@pytest.mark.parametrize(
    'options, paper, ours',
    [
        (dict(), 3 * 25, 2 * 25 + 5),
        (dict(position='none'), 2 * 25, 2 * 25),
        (dict(logits='qr'), 2 * 25, 25 + 5),
    ],
)
def test_attention(options, paper, ours):
    """The terms a channel and pixel, at the resolution before the pooling of stride 2."""
    layer = LocalSelfAttention2d(8, 16, kernel_size=5, num_heads=4, stride=2, **options)
    projections = (2 if 'logits' in options else 3) * 8
    costs = count_costs(layer, torch.zeros(2, 8, 6, 10))
    pixels = 2 * 6 * 10
    assert costs.paper_flops == 2 * pixels * 16 * (projections + paper)
    assert costs.flops == 2 * pixels * 16 * (projections + ours)
    assert costs.parameters == sum(parameter.numel() for parameter in layer.parameters())


def test_output_projection():
    with_it, without = (
        count_costs(LocalSelfAttention2d(8, num_heads=2, out_proj=x), torch.zeros(1, 8, 9, 9))
        for x in (True, False)
    )
    assert with_it.flops - without.flops == 2 * 81 * 8 * 8
    assert with_it.paper_flops - without.paper_flops == 2 * 81 * 8 * 8
    assert with_it.parameters - without.parameters == 8 * 8


@pytest.mark.parametrize(
    'values, projections, mixing', [('plain', 9, 0), ('conv', 6 + 27, 0), ('mixtures', 18, 4)]
)
def test_stem(values, projections, mixing):
    stem = AttentionStem(values=values, num_mixtures=4, value_kernel_size=3)
    costs = count_costs(stem, torch.zeros(1, 3, 8, 12))
    assert costs.paper_flops == 2 * 96 * 64 * (projections + mixing + 2 * 16)
    if values == 'mixtures':
        assert costs.flops == 2 * 96 * 64 * (9 + 2 * 16) + 2 * 16 * 4 * 64 * (1 + 3)
    else:
        assert costs.flops == costs.paper_flops


def test_linear_layers_convolutions_and_a_layer_that_runs_twice():
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    model = nn.Sequential(
        conv, nn.ReLU(), nn.Conv2d(8, 4, 1), conv, nn.Flatten(), nn.Linear(8 * 9, 5)
    )
    costs = count_costs(model, torch.zeros(1, 4, 3, 3))
    macs = 2 * 9 * 8 * 2 * 9 + 9 * 8 * 4 + 8 * 9 * 5
    assert costs == Costs(sum(p.numel() for p in model.parameters()), 2 * macs, 2 * macs)


def test_hooks_are_taken_away_where_the_model_fails():
    layer = nn.Conv2d(4, 4, 1)
    with pytest.raises(RuntimeError):
        count_costs(layer, torch.zeros(1, 3, 2, 2))
    assert not layer._forward_hooks
