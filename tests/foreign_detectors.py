"""Detectors that are not ours, with attention, narrowed so that a step takes a second."""

import copy
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope

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
