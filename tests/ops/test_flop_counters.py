"""What other people's counters say of one layer; docs/layer.md has these figures in its table."""

import logging
import re
from pathlib import Path

import ptflops
import pytest
import thop
import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.layers import AttentionStem, LocalSelfAttention2d
from sasa_det.layers.projection import is_plain
from sasa_det.ops.flop_counters import (
    count_for_ptflops,
    count_for_thop,
    count_layer_macs,
    jit_handles,
)

SHAPE = (64, 56, 56)
X = torch.zeros(1, *SHAPE)
PIXELS = 56 * 56
PROJECTIONS = 3 * 64 * 64 * PIXELS
ATTENTION = (49 + 49 + 7) * 64 * PIXELS  # q.k, values, q.r
PARAMETERS = 3 * 64 * 64 + 2 * 4 * 7
OFFSETS = 2 * 4 * 7  # parameters of the layer's own, which are in none of its parts


# Else ptflops adds the functions that the backends in PyTorch call.
PTFLOPS = dict(
    custom_modules_hooks={LocalSelfAttention2d: count_for_ptflops},
    backend_specific_config=dict(count_functional=False),
)
THOP = dict(custom_ops={LocalSelfAttention2d: count_for_thop})


def new_layer():
    return LocalSelfAttention2d(64, kernel_size=7, num_heads=8)


def by_torch(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops(), None


def by_mmengine(model, x):
    counted = get_model_complexity_info(model, x.shape[1:], show_table=False, show_arch=False)
    return counted['flops'], counted['params']


def by_fvcore(model, x, **handles):
    return FlopCountAnalysis(model, x).set_op_handle(**handles).total(), None


def by_ptflops(model, x, **options):
    shape = tuple(x.shape[1:])
    return ptflops.get_model_complexity_info(
        model, shape, as_strings=False, print_per_layer_stat=False, **options
    )


def by_thop(model, x, **options):
    return thop.profile(model, (x,), verbose=False, **options)


def by_torchinfo(model, x):
    summary = torchinfo.summary(model, input_data=x, verbose=0)
    return summary.total_mult_adds, summary.total_params


ALL = PROJECTIONS + ATTENTION
# The rows of the table: FLOPs and parameters, None where the counter counts none.
COUNTERS = {
    'torch': (by_torch, {}, 2 * ALL, None),
    'mmengine': (by_mmengine, {}, ALL, PARAMETERS),
    'fvcore': (by_fvcore, {}, PROJECTIONS, None),
    'fvcore with our handles': (by_fvcore, jit_handles(), ALL, None),
    'ptflops': (by_ptflops, {}, PROJECTIONS, PARAMETERS),
    'ptflops with our function': (by_ptflops, PTFLOPS, ALL, PARAMETERS),
    'thop': (by_thop, {}, PROJECTIONS, PARAMETERS - OFFSETS),
    'thop with our function': (by_thop, THOP, ALL, PARAMETERS),
    # It has no way to be told, and counts a Linear's weights once, on however many pixels.
    'torchinfo': (by_torchinfo, {}, PARAMETERS - OFFSETS, PARAMETERS),
}


@pytest.mark.parametrize('name', COUNTERS)
def test_a_counter(name):
    count, told, flops, parameters = COUNTERS[name]
    # In a model: the parts of what it is given itself thop counts beside the function.
    model = nn.Sequential(new_layer())
    output = model(X + 1)
    assert count(model, X, **told) == (flops, parameters)
    # It leaves no hook, which would keep the layer from its fused path, and changes no output.
    assert is_plain(model[0].query)
    assert torch.equal(model(X + 1), output)


@pytest.mark.parametrize(
    'options',
    [
        dict(logits='qr'),
        dict(position='none', bias=True, out_proj=True),
        dict(position='absolute', stride=2),
        dict(stride=2, downsample='query', out_proj=True),
        dict(stride=3, downsample='query', logits='qr', bias=True, backend='eager'),
        dict(position_per_head=True, dilation=2, backend='eager'),
    ],
    ids=str,
)
def test_counters_agree_on_the_options(options):
    layer = LocalSelfAttention2d(16, 32, kernel_size=5, num_heads=4, **options)
    x, model = torch.zeros(1, 16, 9, 10), nn.Sequential(layer)
    expected = count_layer_macs(layer, x.shape)
    assert by_torch(model, x)[0] == 2 * expected
    assert by_mmengine(model, x)[0] == expected
    assert by_fvcore(model, x, **jit_handles())[0] == expected
    assert by_thop(model, x, **THOP)[0] == expected
    assert by_ptflops(model, x, **PTFLOPS)[0] == expected


@pytest.mark.parametrize('layer', [new_layer(), AttentionStem(64)], ids=['layer', 'stem'])
def test_mmengine_warns_of_nothing_of_ours(layer, caplog):
    """It warned of the operator in its count of activations, though both counts have it now."""
    with caplog.at_level(logging.WARNING):
        counted = get_model_complexity_info(layer, SHAPE, show_table=False, show_arch=False)
    assert 'attention' not in caplog.text and 'never called' not in caplog.text
    if isinstance(layer, LocalSelfAttention2d):
        # Queries, keys, values and the output.
        assert counted['activations'] == 4 * 64 * PIXELS


def test_the_table_in_the_documentation():
    text = (Path(__file__).parents[2] / 'docs/layer.md').read_text()
    rows = re.findall(r'^\| (\S.*?) \| .* \| ([\d,]+) \| ([\d,]+|-) \|$', text, re.MULTILINE)
    printed = {
        name: tuple(None if x == '-' else int(x.replace(',', '')) for x in figures)
        for name, *figures in rows
    }
    assert printed == {name: row[2:] for name, row in COUNTERS.items()}
