_base_ = '../quickstart/retinanet_sasa-tiny_digits.py'

model = dict(backbone=dict(attn_stages=(False, False, False, True)))
