_base_ = '../bccd/retinanet_sasa-tiny_bccd.py'

model = dict(backbone=dict(stem='attention_conv_values', deep_stem=False))
