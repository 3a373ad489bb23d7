# DETR's neck is one 1x1 convolution, and its head is a transformer, so only the backbone attends.
_base_ = [
    'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    '../_base_/attention.py',
    '../_base_/resumable.py',
]

custom_imports = dict(imports=['sasa_det'])
default_hooks = _base_.resumable_hooks
model = dict(
    # mmdet freezes these batch norm weights at their trained values, but attention is untrained.
    backbone=dict(type='SASAResNet', norm_cfg=dict(requires_grad=True), **_base_.attn_backbone),
)
# A tenth of the learning rate is for a pretrained backbone.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
