"""Attention in detectors that are not ours: each config trains a step and predicts; what cannot is refused."""

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmcv.cnn.utils import fuse_conv_bn
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from sasa_det.evaluation.attention_maps import attention_layers

FOLDER = Path(__file__).resolve().parents[1] / 'configs' / 'other_detectors'
ATTN_CFG = dict(kernel_size=3, num_heads=4, bias=True)
CONV_CFG = dict(type='SASA', attn_cfg=ATTN_CFG)

# Narrow everywhere, so that a step takes a second.
# From random weights mmdet starts each block as the identity, which attention gets no gradient from.
BACKBONE = dict(
    depth=26, base_channels=8, init_cfg=None, zero_init_residual=False, attn_cfg=ATTN_CFG
)
NECK = dict(in_channels=[32, 64, 128, 256], out_channels=32, attn_cfg=ATTN_CFG)
HEAD = dict(
    num_classes=3,
    in_channels=32,
    feat_channels=32,
    stacked_convs=2,
    # With 32 groups one channel at one pixel would be its own mean.
    norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
    conv_cfg=CONV_CFG,
)
# No score is high after one step.
ALL_SCORES = dict(score_thr=0.0)
# A cascade's RPN learns from no anchor that reaches out of the image: they must be small.
RPN = dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[1]))
# The two stages read 7 x 7 and 14 x 14 cells of each region.
ROI = dict(out_channels=32)
BOX = dict(in_channels=32, fc_out_channels=32, num_classes=3)


DENSE = dict(backbone=BACKBONE, neck=NECK, bbox_head=HEAD, test_cfg=ALL_SCORES)


def two_stage(bbox_head, **more):
    return dict(
        backbone=BACKBONE,
        neck=NECK,
        rpn_head=RPN,
        roi_head={**dict(bbox_roi_extractor=ROI, bbox_head=bbox_head), **more},
        test_cfg=dict(rcnn=ALL_SCORES),
    )


def cascade(config):
    """The three heads of a cascade are a list, which a config replaces as a whole."""
    heads = copy.deepcopy(config.model.roi_head.bbox_head)
    for head in heads:
        head.update(BOX)
    extractor = {**config.model.roi_head.bbox_roi_extractor, **ROI}
    return two_stage(heads, bbox_roi_extractor=extractor)


MASK = dict(in_channels=32, conv_out_channels=32, num_classes=3, num_convs=2, conv_cfg=CONV_CFG)
TRANSFORMER = dict(
    num_layers=1,
    layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=32),
    ),
)
DECODER = copy.deepcopy(TRANSFORMER)
DECODER['layer_cfg']['cross_attn_cfg'] = dict(embed_dims=32, num_heads=4)
KEEPING = dict(CONV_CFG, keep_grouped=True)

# What to narrow in each config, and how many layers attend in each part then. A depth of 26 has 8
# bottlenecks; FPN has 3x3s at its levels of the backbone and, in dense detectors, two on top.
DETECTORS = {
    'faster-rcnn_sasa-r50_sasa-fpn_1x_coco': (two_stage(BOX), dict(backbone=8, neck=4)),
    'mask-rcnn_sasa-r50_sasa-fpn_sasa-mask-head_1x_coco': (
        two_stage(BOX, mask_roi_extractor=ROI, mask_head=MASK),
        dict(backbone=8, neck=4, roi_head=2),
    ),
    'cascade-rcnn_sasa-r50_sasa-fpn_1x_coco': (cascade, dict(backbone=8, neck=4)),
    'fcos_sasa-r50-caffe_sasa-fpn_gn-sasa-head_1x_coco': (
        DENSE,
        dict(backbone=8, neck=5, bbox_head=4),
    ),
    'atss_sasa-r50_sasa-fpn_sasa-head_1x_coco': (
        DENSE,
        dict(backbone=8, neck=5, bbox_head=4),
    ),
    'gfl_sasa-r50_sasa-fpn_sasa-head_1x_coco': (
        DENSE,
        dict(backbone=8, neck=5, bbox_head=4),
    ),
    # Two layers of stride 2, three outputs; the towers of the three levels share their layers.
    'rtmdet_tiny_sasa-pafpn_sasa-head_8xb32-300e_coco': (
        dict(
            backbone=dict(widen_factor=0.125, init_cfg=None, norm_cfg=dict(type='BN')),
            neck=dict(
                in_channels=[32, 64, 128],
                out_channels=32,
                norm_cfg=dict(type='BN'),
                conv_cfg=KEEPING,
            ),
            bbox_head={**HEAD, 'norm_cfg': dict(_delete_=True, type='BN')},
            test_cfg=ALL_SCORES,
        ),
        dict(neck=5, bbox_head=4),
    ),
    'detr_sasa-r50_8xb2-150e_coco': (
        dict(
            backbone=BACKBONE,
            num_queries=10,
            test_cfg=dict(max_per_img=10),
            neck=dict(in_channels=[256], out_channels=32),
            encoder=TRANSFORMER,
            decoder=DECODER,
            positional_encoding=dict(num_feats=16),
            bbox_head=dict(num_classes=3, embed_dims=32),
        ),
        dict(backbone=8),
    ),
}


def read(name, narrower=None):
    """Read a config and narrow its model."""
    config = Config.fromfile(FOLDER / f'{name}.py')
    if callable(narrower):
        narrower = narrower(config)
    config.merge_from_dict(dict(model=narrower or {}))
    return config


def build(config):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(config.model)


def inputs(model, training, with_mask):
    """Two images of odd sizes with a few boxes, as a data loader gives them."""
    shapes = [[3, 128, 96], [3, 97, 127]]
    batch = demo_mm_inputs(2, shapes, num_items=[2, 3], num_classes=3, with_mask=with_mask)
    return model.data_preprocessor(batch, training)


@pytest.fixture(scope='module', params=DETECTORS)
def detector(request):
    """A narrowed detector, its config, and what attends in it."""
    narrower, attending = DETECTORS[request.param]
    config = read(request.param, narrower)
    assert config.custom_imports == dict(imports=['sasa_det'])
    model = build(config)
    model.init_weights()
    return model, config, attending


def with_mask(model):
    return getattr(model, 'with_mask', False)


def test_each_config_has_its_case():
    assert {path.stem for path in FOLDER.glob('*.py')} == DETECTORS.keys()


def test_trains_a_step(detector):
    model, config, attending = detector
    attention = {
        f'{layer}.{name}': parameter
        for layer, module in attention_layers(model).items()
        for name, parameter in module.named_parameters()
    }
    assert Counter(name.split('.')[0] for name in attention_layers(model)) == attending

    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    model.train()
    total, log = model.parse_losses(model(**inputs(model, True, with_mask(model)), mode='loss'))
    assert all(math.isfinite(float(value)) for value in log.values()), log
    optimizer.backward(total)
    without = [name for name, p in attention.items() if p.grad is None or not p.grad.any()]
    assert without == []
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_predicts(detector):
    model, _, _ = detector
    model.eval()
    data = inputs(model, False, with_mask(model))
    with torch.no_grad():
        found = model(**data, mode='predict')
    assert len(found) == 2
    for sample in found:
        boxes, (height, width) = sample.pred_instances, sample.ori_shape[:2]
        assert len(boxes) > 0
        corners = boxes.bboxes
        assert corners.isfinite().all() and (corners >= 0).all()
        assert (corners[:, 0::2] <= width).all() and (corners[:, 1::2] <= height).all()
        assert ((boxes.scores >= 0) & (boxes.scores <= 1)).all()
        assert ((boxes.labels >= 0) & (boxes.labels < 3)).all()
        if with_mask(model):
            assert boxes.masks.shape == (len(boxes), height, width)
            assert boxes.masks.dtype == torch.bool


def test_batch_norms_fuse_around_attention(detector):
    """As mmdet's benchmark.py --fuse-conv-bn has them: attention has no batch norm folded into it."""
    model, _, _ = detector
    exact = copy.deepcopy(model).double().eval()
    fused = fuse_conv_bn(copy.deepcopy(exact))
    images = inputs(model, False, False)['inputs'].double()
    with torch.no_grad():
        for expected, found in zip(exact.extract_feat(images), fused.extract_feat(images)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


class TestWhatCannotAttend:
    def test_depthwise_convolutions(self):
        """Without keep_grouped RTMDet's neck is refused."""
        name = 'rtmdet_tiny_sasa-pafpn_sasa-head_8xb32-300e_coco'
        config = read(name, dict(neck=dict(conv_cfg=dict(keep_grouped=False))))
        with pytest.raises(ValueError, match='groups must be 1 .* keep_grouped=True in conv_cfg'):
            build(config)

    def test_resnext(self):
        backbone = dict(type='ResNeXt', depth=50, groups=32, base_width=4, conv_cfg=CONV_CFG)
        with pytest.raises(ValueError, match='groups must be 1 .* but is 32'):
            MODELS.build(backbone)

    def test_heads_that_do_not_divide_the_channels(self):
        name = 'atss_sasa-r50_sasa-fpn_sasa-head_1x_coco'
        with pytest.raises(ValueError, match='num_heads must divide out_channels, 36, but is 8'):
            build(read(name, dict(bbox_head=dict(feat_channels=36))))

    def test_a_stage_with_deformable_convolution(self):
        name = 'faster-rcnn_sasa-r50_sasa-fpn_1x_coco'
        dcn = dict(dcn=dict(type='DCNv2'), stage_with_dcn=(False, True, True, True))
        with pytest.raises(ValueError, match='stage 2 can attend or be deformable'):
            build(read(name, dict(backbone=dcn)))


def test_a_deformable_last_layer_takes_the_place_of_attention():
    """mmdet's dcn_on_last_conv sets the last layer of each tower, and attention has the others."""
    narrower, _ = DETECTORS['fcos_sasa-r50-caffe_sasa-fpn_gn-sasa-head_1x_coco']
    narrower = copy.deepcopy(narrower)
    narrower['bbox_head'].update(dcn_on_last_conv=True)
    model = build(read('fcos_sasa-r50-caffe_sasa-fpn_gn-sasa-head_1x_coco', narrower))
    attending = [name for name in attention_layers(model) if name.startswith('bbox_head')]
    assert attending == ['bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.0.conv']


def test_rtmdets_levels_share_their_attention():
    name = 'rtmdet_tiny_sasa-pafpn_sasa-head_8xb32-300e_coco'
    head = build(read(name, DETECTORS[name][0])).bbox_head
    for tower in (head.cls_convs, head.reg_convs):
        assert tower[0][0].conv is tower[1][0].conv is tower[2][0].conv
        assert tower[0][0].bn is not tower[1][0].bn
