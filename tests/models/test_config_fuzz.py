"""Random options of the three components: they build and run, or a ValueError names the option.

More of them: ``SASA_TRIALS=5000 pytest tests/models/test_config_fuzz.py``.
"""

import math
import os

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.models import SASAFPN, SASAResNet, SASARetinaHead

fuzz = settings(
    max_examples=int(os.environ.get('SASA_TRIALS', '40')), deadline=None, derandomize=True
)
odd = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        2,
        1.5,
        math.nan,
        math.inf,
        '',
        '7',
        'same',
        (),
        (3, 5),
        (3, 3),
        [1],
        {},
        10**9,
    ]
)
RIGHT = dict(
    kernel_size=st.sampled_from([1, 3, 5, (3, 3)]),
    num_heads=st.sampled_from([1, 2, 4, 8, 3]),
    bias=st.booleans(),
    position=st.sampled_from(['relative', 'absolute', 'none']),
    position_per_head=st.booleans(),
    logits=st.sampled_from([None, 'qk+qr', 'qk', 'qr']),
    border=st.sampled_from(['zeros', 'mask']),
    scale=st.floats(0.01, 2),
    out_proj=st.booleans(),
    value_std=st.sampled_from([None, 0.01, 1.0]),
    backend=st.sampled_from(['auto', 'eager', 'reference', 'native']),
)
attn_cfgs = st.fixed_dictionaries({}, optional=RIGHT)


@st.composite
def spoilt_attn_cfgs(draw):
    """Options of which one has a value that it may not be able to have."""
    attn_cfg = draw(attn_cfgs)
    name = draw(st.sampled_from([*RIGHT, 'kernel', '']))
    return {**attn_cfg, name: draw(odd)}, name


def build_and_run(options, build, *inputs):
    """Run what is built forward and backward; return the text of the ValueError, if it is one."""
    try:
        module = build()
    except ValueError as error:
        assert any(name in str(error) for name in options), (str(error), options)
        return str(error)
    outputs = module(*inputs)
    flat = []
    for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
        flat += output if isinstance(output, (tuple, list)) else [output]
    total = sum(output.float().sum() for output in flat)
    assert torch.isfinite(total)
    total.backward()
    return ''


@fuzz
@given(attn_cfg=attn_cfgs, stride=st.sampled_from([1, 2, (2, 2)]), dilation=st.sampled_from([1, 2]))
def test_layers(attn_cfg, stride, dilation):
    options = dict(attn_cfg, stride=stride, dilation=dilation)
    # position comes with a default that logits may not go with.
    names = [*options, 'num_heads', 'position', 'logits']
    build_and_run(names, lambda: LocalSelfAttention2d(8, 16, **options), torch.randn(2, 8, 5, 6))


@fuzz
@given(spoilt=spoilt_attn_cfgs())
@example(spoilt=({'value_std': 'small'}, 'value_std'))
@example(spoilt=({'value_std': math.inf}, 'value_std'))
@example(spoilt=({'scale': '2'}, 'scale'))
@example(spoilt=({'kernel_size': True}, 'kernel_size'))
@example(spoilt=({'num_heads': 0}, 'num_heads'))
def test_layers_with_an_odd_option(spoilt):
    attn_cfg, name = spoilt
    neck = dict(in_channels=[16], out_channels=16, num_outs=1, attn_cfg=attn_cfg)
    names = [*attn_cfg, 'position', 'num_heads', 'logits']
    text = build_and_run(names, lambda: SASAFPN(**neck), [torch.randn(1, 16, 4, 5)])
    if name in ('kernel', ''):
        assert f'unknown key {name!r}' in text


@fuzz
@given(
    attn_cfg=st.none()
    | attn_cfgs
    | st.just(dict(num_heads=4, bias=True))
    | st.lists(st.none() | attn_cfgs, min_size=3, max_size=5),
    depth=st.sampled_from([26, 26, 38, 18, '26']),
    attn_stages=st.lists(st.booleans(), min_size=4, max_size=4)
    | st.lists(st.booleans(), max_size=5),
    stem=st.sampled_from(['conv', 'attention', 'attention_plain', 'attention_conv_values', 'no']),
    deep_stem=st.booleans(),
)
def test_backbones(attn_cfg, depth, attn_stages, stem, deep_stem):
    options = dict(
        attn_cfg=attn_cfg, depth=depth, attn_stages=attn_stages, stem=stem, deep_stem=deep_stem
    )
    build_and_run(
        [*options, *RIGHT],
        lambda: SASAResNet(base_channels=8, stem_channels=8, **options),
        torch.randn(2, 3, 33, 40),
    )


@fuzz
@given(
    attn_cfg=st.none() | attn_cfgs,
    attn_parts=st.lists(st.sampled_from(['cls', 'reg', 'predictors', 'outputs']), max_size=3),
    predictor=st.sampled_from(['attention', 'pointwise', 'mix', 'conv']),
)
def test_heads(attn_cfg, attn_parts, predictor):
    options = dict(attn_cfg=attn_cfg, attn_parts=attn_parts, predictor=predictor)
    build_and_run(
        [*options, *RIGHT],
        lambda: SASARetinaHead(3, 16, feat_channels=16, stacked_convs=1, **options),
        [torch.randn(1, 16, 4, 5)] * 2,
    )
