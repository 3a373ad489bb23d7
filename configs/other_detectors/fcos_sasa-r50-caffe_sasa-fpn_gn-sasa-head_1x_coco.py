# In the bbox_head both towers attend; the predictors stay convolutions. In Caffe's ResNet a 1x1
# convolution has the stride, so no attention pools.
_base_ = [
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    '../_base_/attention.py',
    '../_base_/resumable.py',
]

custom_imports = dict(imports=['sasa_det'])
default_hooks = _base_.resumable_hooks
model = dict(
    # mmdet freezes these batch norm weights at their trained values, but attention is untrained.
    backbone=dict(type='SASAResNet', norm_cfg=dict(requires_grad=True), **_base_.attn_backbone),
    neck=dict(type='SASAFPN', **_base_.attn_neck),
    bbox_head=dict(conv_cfg=_base_.attn_conv_cfg),
)
