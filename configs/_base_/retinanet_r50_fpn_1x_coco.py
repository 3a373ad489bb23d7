# mmdet's RetinaNet with our types in place of its own. Without attn_cfg every part is a convolution,
# and the model is mmdet's to the bit. Configs that inherit it give attn_cfg to the parts that
# attend.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', './resumable.py']

custom_imports = dict(imports=['sasa_det'])
default_hooks = {{_base_.resumable_hooks}}

model = dict(
    backbone=dict(type='SASAResNet'),
    neck=dict(type='SASAFPN'),
    bbox_head=dict(type='SASARetinaHead'),
)
