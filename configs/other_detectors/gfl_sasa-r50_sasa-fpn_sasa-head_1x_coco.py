# In the bbox_head both towers attend; the predictors stay convolutions.
_base_ = [
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py',
    '../_base_/attention.py',
    '../_base_/resumable.py',
]

custom_imports = dict(imports=['sasa_det'])
default_hooks = _base_.resumable_hooks
model = dict(
    backbone=dict(type='SASAResNet', **_base_.attn_backbone),
    neck=dict(type='SASAFPN', **_base_.attn_neck),
    bbox_head=dict(conv_cfg=_base_.attn_conv_cfg),
)
optim_wrapper = _base_.attn_optim
