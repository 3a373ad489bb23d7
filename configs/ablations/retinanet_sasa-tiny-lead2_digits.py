_base_ = '../quickstart/retinanet_sasa-tiny_digits.py'

attn_cfg = dict(init_lead=2)
model = dict(
    backbone=dict(attn_cfg=attn_cfg),
    neck=dict(attn_cfg=attn_cfg),
    bbox_head=dict(attn_cfg=attn_cfg),
)
