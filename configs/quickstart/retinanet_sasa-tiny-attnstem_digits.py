_base_ = './retinanet_sasa-tiny_digits.py'

model = dict(backbone=dict(stem='attention', deep_stem=False))
