"""The components beside mmdet's own, part by part, and what they refuse."""

import pytest
import torch
from mmdet.models import FPN, ResNet, RetinaHead
from mmdet.registry import MODELS
from torch import nn

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.models import SASAFPN, SASAResNet, SASARetinaHead

ATTN = dict(kernel_size=3, num_heads=4)
NECK = dict(
    in_channels=[16, 32, 64], out_channels=16, num_outs=5, start_level=1, add_extra_convs='on_input'
)
HEAD = dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=2)


def same_output(ours, theirs, *inputs):
    """Load theirs into ours strictly, and compare what they compute to the bit, eval and train."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for mode in (False, True):
        ours.train(mode), theirs.train(mode)
        for a, b in zip(flat(ours(*inputs)), flat(theirs(*inputs))):
            assert torch.equal(a, b)


def flat(x):
    return [z for y in x for z in flat(y)] if isinstance(x, (list, tuple)) else [x]


def attends(module):
    return {name for name, m in module.named_modules() if isinstance(m, LocalSelfAttention2d)}


class TestWithoutAttentionEachIsMmdets:
    @pytest.mark.parametrize('depth', [50, 101, 152])
    def test_resnet(self, depth):
        kwargs = dict(base_channels=8, norm_eval=False)
        ours, theirs = SASAResNet(depth, **kwargs), ResNet(depth, **kwargs)
        same_output(ours, theirs, torch.randn(2, 3, 64, 70))

    def test_resnet_with_attn_cfg_but_no_stages(self):
        ours = SASAResNet(50, base_channels=8, attn_stages=(False,) * 4, attn_cfg=ATTN)
        same_output(ours, ResNet(50, base_channels=8), torch.randn(2, 3, 64, 70))

    def test_fpn(self):
        maps = [torch.randn(1, c, n, n + 1) for c, n in ((16, 32), (32, 16), (64, 8))]
        same_output(SASAFPN(**NECK), FPN(**NECK), maps)

    def test_head(self):
        maps = [torch.randn(1, 16, n, n + 1) for n in (16, 8, 4, 2, 1)]
        same_output(SASARetinaHead(**HEAD), RetinaHead(**HEAD), maps)

    def test_the_same_seed_gives_the_same_weights(self):
        for ours, theirs, kwargs in (
            (SASAResNet, ResNet, dict(depth=50, base_channels=8)),
            (SASAFPN, FPN, NECK),
            (SASARetinaHead, RetinaHead, HEAD),
        ):
            states = []
            for build in (ours, theirs):
                torch.manual_seed(0)
                module = build(**kwargs)
                module.init_weights()
                states.append(module.state_dict())
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class TestSASAResNet:
    @pytest.mark.parametrize(
        'depth, blocks', [(26, (1, 2, 4, 1)), (38, (2, 3, 5, 2)), (50, (3, 4, 6, 3))]
    )
    def test_every_spatial_convolution_but_the_stems_attends(self, depth, blocks):
        model = SASAResNet(depth, base_channels=8, attn_cfg=ATTN)
        expected = {
            f'layer{stage + 1}.{block}.conv2'
            for stage, count in enumerate(blocks)
            for block in range(count)
        }
        assert attends(model) == expected
        spatial = [
            m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)
        ]
        assert spatial == [model.conv1]

    def test_each_stage_is_switched_by_itself(self):
        for stages in ((True, False, False, False), (False, False, True, True)):
            model = SASAResNet(26, base_channels=8, attn_stages=stages, attn_cfg=ATTN)
            attending = {int(name[5]) for name in attends(model)}
            assert attending == {n + 1 for n, on in enumerate(stages) if on}

    def test_one_attn_cfg_a_stage(self):
        cfgs = [dict(kernel_size=k, num_heads=h) for k, h in ((3, 1), (5, 2), (7, 4), (9, 8))]
        model = SASAResNet(26, base_channels=16, attn_cfg=cfgs)
        for stage, cfg in enumerate(cfgs):
            layer = getattr(model, f'layer{stage + 1}')[0].conv2
            assert (layer.kernel_size, layer.num_heads) == (cfg['kernel_size'], cfg['num_heads'])

    def test_keeps_size_and_names_of_resnet(self):
        ours = SASAResNet(50, base_channels=8, attn_cfg=ATTN)
        theirs = ResNet(50, base_channels=8)
        x = torch.randn(1, 3, 75, 101)
        assert [a.shape for a in ours(x)] == [b.shape for b in theirs(x)]
        missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert all('.conv2.' in key for key in missing + unexpected)
        shared = theirs.state_dict().keys() & ours.state_dict().keys()
        assert len(shared) == len(theirs.state_dict()) - 16

    def test_dilated_and_caffe_style_stages(self):
        options = dict(
            base_channels=8, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), style='caffe',
            out_indices=(1, 3),
        )  # fmt: skip
        ours, theirs = SASAResNet(50, attn_cfg=ATTN, **options), ResNet(50, **options)
        x = torch.randn(1, 3, 65, 64)
        assert [a.shape for a in ours(x)] == [b.shape for b in theirs(x)]
        assert ours.layer4[0].conv2.dilation == 4

    def test_frozen_stages_and_checkpointing(self):
        model = SASAResNet(26, base_channels=8, attn_cfg=ATTN, frozen_stages=2, with_cp=True)
        model.train()
        model(torch.randn(1, 3, 64, 64))[-1].sum().backward()
        for name, p in model.named_parameters():
            frozen = name.split('.')[0] in ('conv1', 'bn1', 'layer1', 'layer2')
            assert p.requires_grad != frozen and (p.grad is None) == frozen

    def test_every_parameter_learns(self):
        model = SASAResNet(26, base_channels=8, attn_cfg=ATTN, zero_init_residual=False)
        model.init_weights()
        model.train()
        sum(out.square().mean() for out in model(torch.randn(2, 3, 64, 64))).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())

    def test_fewer_stages(self):
        model = SASAResNet(26, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1),
                           out_indices=(1,), attn_cfg=ATTN)  # fmt: skip
        assert len(model(torch.randn(1, 3, 32, 32))) == 1

    @pytest.mark.parametrize(
        'kwargs, message',
        [
            (dict(depth=34), r'depth must be one of \(26, 38, 50, 101, 152\), but is 34'),
            (dict(stem='conv7'), r"stem must be one of .*, but is 'conv7'"),
            (dict(attn_stages=(True, True)), r'attn_stages must be 4 booleans, .* \(True, True\)'),
            (dict(attn_stages=(2, 1, 0, 0)), r'attn_stages must be 4 booleans'),
            (dict(attn_cfg=[ATTN] * 3), 'attn_cfg must be one dict or 4, one per stage, but are 3'),
            (
                dict(attn_cfg=None, attn_stages=(False, True, True, True)),
                'has stage 2 attend, but its attn_cfg is None; give it',
            ),
            (
                dict(attn_cfg=[ATTN, ATTN, None, ATTN], attn_stages=(True,) * 4),
                'has stage 3 attend, but its attn_cfg is None',
            ),
            (
                dict(conv_cfg=dict(type='SASA', kernel_size=7)),
                r'conv_cfg=.* would replace the stem .* give attn_cfg=dict',
            ),
            (dict(attn_cfg='SASA'), "attn_cfg must be a dict or None, but is 'SASA'"),
            (
                dict(attn_cfg=dict(kernel=7)),
                "unknown key 'kernel'; it takes kernel_size, num_heads",
            ),
            (dict(attn_cfg=dict(stride=2)), "unknown key 'stride'"),
            (dict(attn_cfg=dict(kernel_size=4)), 'kernel_size must be an odd integer'),
            (dict(attn_cfg=dict(num_heads=3)), 'num_heads must divide out_channels, 64, but is 3'),
            (
                dict(attn_cfg=ATTN, dcn=dict(type='DCN'), stage_with_dcn=(False, True, True, True)),
                'stage 2 can attend or be deformable',
            ),
        ],
    )
    def test_refuses_when_built_from_a_config(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            MODELS.build(dict(dict(type='SASAResNet', depth=26), **kwargs))


class TestSASAFPN:
    @pytest.mark.parametrize(
        'parts, expected',
        [
            (('outputs', 'extras'), {0, 1, 2, 3, 4}),
            (('outputs',), {0, 1}),
            (('extras',), {2, 3, 4}),
            ((), set()),
        ],
    )
    def test_parts(self, parts, expected):
        neck = SASAFPN(**NECK, attn_cfg=ATTN, attn_parts=parts)
        assert attends(neck) == {f'fpn_convs.{n}.conv' for n in expected}
        maps = [torch.randn(1, c, n, n + 1) for c, n in ((16, 33), (32, 17), (64, 9))]
        sizes = [out.shape for out in neck(maps)]
        assert sizes == [out.shape for out in FPN(**NECK)(maps)]

    def test_refuses(self):
        with pytest.raises(
            ValueError, match=r"attn_parts may hold \('outputs', 'extras'\), but has 'P6'"
        ):
            MODELS.build(dict(type='SASAFPN', **NECK, attn_cfg=ATTN, attn_parts=('P6',)))
        with pytest.raises(ValueError, match="unknown key 'heads'"):
            MODELS.build(dict(type='SASAFPN', **NECK, attn_cfg=dict(heads=2)))
        with pytest.raises(
            ValueError, match=r"attn_parts=\('outputs',\) asks for attention, but attn_cfg"
        ):
            MODELS.build(dict(type='SASAFPN', **NECK, attn_parts='outputs'))


class TestSASARetinaHead:
    @pytest.mark.parametrize(
        'parts, expected',
        [
            (('cls',), {'cls_convs.0.conv', 'cls_convs.1.conv'}),
            (('reg',), {'reg_convs.0.conv', 'reg_convs.1.conv'}),
            (('predictors',), {'cls_convs.2.conv', 'reg_convs.2.conv'}),
            ((), set()),
        ],
    )
    def test_parts(self, parts, expected):
        head = SASARetinaHead(**HEAD, attn_cfg=ATTN, attn_parts=parts)
        assert attends(head) == expected
        kernel = (1, 1) if 'predictors' in parts else (3, 3)
        assert head.retina_cls.kernel_size == head.retina_reg.kernel_size == kernel
        maps = [torch.randn(1, 16, n, n + 1) for n in (16, 8, 4, 2, 1)]
        ours, theirs = head(maps), RetinaHead(**HEAD)(maps)
        assert [x.shape for x in flat(ours)] == [x.shape for x in flat(theirs)]

    @pytest.mark.parametrize('predictor, extra', [('pointwise', 0), ('mix', 1)])
    def test_predictors_without_attention_of_their_own(self, predictor, extra):
        head = SASARetinaHead(**HEAD, attn_cfg=ATTN, predictor=predictor)
        assert attends(head) == {
            f'{part}_convs.{n}.conv' for part in ('cls', 'reg') for n in (0, 1)
        }
        for tower in (head.cls_convs, head.reg_convs):
            mixing = list(tower)[2:]
            assert [(m.conv.kernel_size, m.with_activation) for m in mixing] == [
                ((1, 1), True)
            ] * extra
        assert head.retina_cls.kernel_size == head.retina_reg.kernel_size == (1, 1)
        maps = [torch.randn(1, 16, n, n + 1) for n in (16, 8, 4, 2, 1)]
        ours, theirs = head(maps), RetinaHead(**HEAD)(maps)
        assert [x.shape for x in flat(ours)] == [x.shape for x in flat(theirs)]

    def test_predictors_are_initialised_as_mmdet_does(self):
        """The classes' prior probability, 0.01, is what makes the focal loss start calmly."""
        head = SASARetinaHead(**HEAD, attn_cfg=ATTN)
        before = head.cls_convs[2].conv.value.weight.clone()
        head.init_weights()
        assert torch.allclose(head.retina_cls.bias.sigmoid(), torch.tensor(0.01))
        assert 0.005 < head.retina_cls.weight.std() < 0.015
        assert torch.equal(head.cls_convs[2].conv.value.weight, before)

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"attn_parts may hold .*, but has 'box'"):
            MODELS.build(dict(type='SASARetinaHead', **HEAD, attn_cfg=ATTN, attn_parts='box'))
        with pytest.raises(
            ValueError, match=r"attn_parts=\('cls',\) asks for attention, but attn_cfg"
        ):
            MODELS.build(dict(type='SASARetinaHead', **HEAD, attn_parts=['cls']))
        with pytest.raises(ValueError, match=r"predictor must be one of .*'mix'\), but is 'conv'"):
            MODELS.build(dict(type='SASARetinaHead', **HEAD, attn_cfg=ATTN, predictor='conv'))


@pytest.mark.parametrize(
    'build, part',
    [
        (
            lambda: SASAResNet(26, base_channels=16, attn_cfg=dict(num_heads=24)),
            'SASAResNet, stage 1: num_heads must divide out_channels, 16, but is 24',
        ),
        (
            lambda: SASAResNet(
                26, stem='attention', stem_cfg=dict(num_heads=5), attn_cfg=dict(num_heads=4)
            ),
            'SASAResNet, stem: num_heads must divide out_channels, 64, but is 5',
        ),
        (
            lambda: SASAFPN([16], 16, num_outs=1, attn_cfg=dict(num_heads=3)),
            'SASAFPN, outputs: num_heads must divide out_channels, 16, but is 3',
        ),
        (
            lambda: SASARetinaHead(
                3, 16, feat_channels=16, attn_cfg=dict(num_heads=3), attn_parts='reg'
            ),
            'SASARetinaHead, reg: num_heads must divide out_channels, 16, but is 3',
        ),
        (
            lambda: SASARetinaHead(
                3, 16, feat_channels=16, attn_cfg=dict(num_heads=3), attn_parts='predictors'
            ),
            'SASARetinaHead, predictors: num_heads must divide out_channels, 16, but is 3',
        ),
    ],
)
def test_an_argument_is_refused_with_the_part_of_the_detector(build, part):
    with pytest.raises(ValueError, match=part):
        build()
