_base_ = '../bccd/retinanet_sasa-tiny_bccd.py'

model = dict(backbone=dict(attn_stages=(False, False, False, True)))
