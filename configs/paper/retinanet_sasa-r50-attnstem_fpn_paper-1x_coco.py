_base_ = './retinanet_sasa-r50_fpn_paper-1x_coco.py'

model = dict(backbone=dict(stem='attention'))
