_base_ = '../bccd/retinanet_sasa-tiny_bccd.py'

attn_cfg = dict(logits='qr', constant_query=True)
model = dict(
    backbone=dict(attn_cfg=attn_cfg),
    neck=dict(attn_cfg=attn_cfg),
    bbox_head=dict(attn_cfg=attn_cfg),
)
