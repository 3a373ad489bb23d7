# In the neck the layers of stride 2 and the output layers attend. Its blocks and the backbone
# consist of depthwise convolutions, which attention does not replace. So the backbone stays
# mmdet's.
_base_ = [
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    '../_base_/attention.py',
    '../_base_/resumable.py',
]

custom_imports = dict(imports=['sasa_det'])
default_hooks = _base_.resumable_hooks
model = dict(
    neck=dict(conv_cfg=dict(**_base_.attn_conv_cfg, keep_grouped=True)),
    bbox_head=dict(conv_cfg=_base_.attn_conv_cfg),
)
optim_wrapper = _base_.attn_optim
