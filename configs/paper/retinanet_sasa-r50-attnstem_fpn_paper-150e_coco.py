_base_ = './retinanet_sasa-r50_fpn_paper-150e_coco.py'

model = dict(backbone=dict(stem='attention'))
