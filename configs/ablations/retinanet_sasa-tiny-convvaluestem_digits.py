_base_ = '../quickstart/retinanet_sasa-tiny_digits.py'

model = dict(backbone=dict(stem='attention_conv_values', deep_stem=False))
