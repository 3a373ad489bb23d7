_base_ = './sasa-r26_32xb128-130e_in1k.py'

model = dict(backbone=dict(stem='attention'))
