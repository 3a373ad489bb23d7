_base_ = './retinanet_sasa-r50_sasa-fpn_sasa-head_paper-1x_coco.py'

model = dict(backbone=dict(stem='attention'))
