_base_ = '../bccd/retinanet_sasa-tiny_bccd.py'

model = dict(backbone=dict(attn_stages=(True, True, False, False)))
