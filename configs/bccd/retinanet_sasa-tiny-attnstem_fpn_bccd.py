_base_ = './retinanet_sasa-tiny_fpn_bccd.py'

model = dict(backbone=dict(stem='attention', deep_stem=False))
