# The RPN, and the fully connected layers on each region, take no conv_cfg.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/attention.py',
    '../_base_/resumable.py',
]

custom_imports = dict(imports=['sasa_det'])
default_hooks = _base_.resumable_hooks
model = dict(
    backbone=dict(type='SASAResNet', **_base_.attn_backbone),
    neck=dict(type='SASAFPN', **_base_.attn_neck),
)
optim_wrapper = _base_.attn_optim
