# In the head both towers attend; the layers that predict stay convolutions. In Caffe's ResNet a 1x1
# convolution has the stride, so no attention pools.
_base_ = [
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    '../_base_/attention.py',
    '../_base_/resumable.py',
]

custom_imports = dict(imports=['sasa_det'])
default_hooks = _base_.resumable_hooks
model = dict(
    # mmdet leaves these weights of batch norm as they were trained, which attention was not.
    backbone=dict(type='SASAResNet', norm_cfg=dict(requires_grad=True), **_base_.attn_backbone),
    neck=dict(type='SASAFPN', **_base_.attn_neck),
    bbox_head=dict(conv_cfg=_base_.attn_conv_cfg),
)
