"""Small detectors of several kinds, with random weights."""

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict

import sasa_det

HEADS = dict(
    retina=dict(
        type='SASARetinaHead',
        attn_cfg=dict(kernel_size=3, num_heads=2, bias=True),
        attn_parts=('cls',),
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=2, ratios=[0.5, 1.0],
            strides=[4, 8, 16],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
    ),
    fcos=dict(type='FCOSHead', strides=[4, 8, 16]),
    atss=dict(
        type='ATSSHead',
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=8, scales_per_octave=1, ratios=[1.0],
            strides=[4, 8, 16],
        ),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True),
    ),
    gfl=dict(
        type='GFLHead',
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=8, scales_per_octave=1, ratios=[1.0],
            strides=[4, 8, 16],
        ),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
        loss_dfl=dict(type='DistributionFocalLoss'),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        reg_max=4,
    ),
)  # fmt: skip
DETECTORS = dict(retina='RetinaNet', fcos='FCOS', atss='ATSS', gfl='GFL')


def configure(kind: str) -> ConfigDict:
    """Give the config of a small detector."""
    config = ConfigDict(
        type=DETECTORS[kind],
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[120.0, 110.0, 100.0], std=[58.0, 57.0, 56.0],
            bgr_to_rgb=True, pad_size_divisor=16,
        ),
        backbone=dict(
            type='SASAResNet', depth=26, num_stages=2, out_indices=(0, 1), strides=(1, 2),
            dilations=(1, 1), base_channels=8, stem_channels=8, attn_stages=(False, True),
            attn_cfg=dict(kernel_size=5, num_heads=4),
        ),
        neck=dict(
            type='SASAFPN', in_channels=[32, 64], out_channels=16, num_outs=3,
            add_extra_convs='on_output',
        ),
        bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1, **HEADS[kind]),
        test_cfg=dict(
            nms_pre=60, min_bbox_size=0, score_thr=0.05, max_per_img=30,
            nms=dict(type='nms', iou_threshold=0.5),
        ),
    )  # fmt: skip
    if kind != 'retina':  # their group norm takes no fewer channels than 32
        config.bbox_head.norm_cfg = None
    return config


def build(kind: str):
    """Build a small detector, whose scores are spread rather than all alike."""
    register_all_modules()
    sasa_det.register()
    torch.manual_seed(0)
    detector = MODELS.build(configure(kind))
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.3)
    return detector.eval()


def save(detector, folder):
    """Leave a detector of kind 'retina' in a folder as training does; return its checkpoint."""
    model = configure('retina').to_dict()
    (folder / 'small.py').write_text(
        "custom_imports = dict(imports=['sasa_det'])\n"
        f'model = {model!r}\n'
        'image = dict(type="LoadImageFromFile"), dict(type="Resize", scale=(90, 70), keep_ratio=True)\n'
        'pack = dict(type="PackDetInputs", meta_keys=("img_shape", "ori_shape", "scale_factor"))\n'
        'test_dataloader = dict(dataset=dict(type="CocoDataset", pipeline=[*image, pack], data_root="data/", '
        'data_prefix=dict(img="nowhere/")))\n'
        "default_scope = 'mmdet'\n"
    )
    meta = dict(dataset_meta=detector.dataset_meta)
    checkpoint = folder / 'epoch_1.pth'
    torch.save(dict(state_dict=detector.state_dict(), meta=meta), checkpoint)
    return checkpoint
