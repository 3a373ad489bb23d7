_base_ = './sasa-r38_32xb128-130e_in1k.py'

model = dict(backbone=dict(stem='attention'))
