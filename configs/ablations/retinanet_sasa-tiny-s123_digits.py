_base_ = '../quickstart/retinanet_sasa-tiny_digits.py'

model = dict(backbone=dict(attn_stages=(True, True, True, False)))
