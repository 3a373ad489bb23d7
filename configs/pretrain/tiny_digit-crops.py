_base_ = [
    '../_base_/classifier_tiny.py',
    '../_base_/datasets/digit_crops.py',
    '../_base_/schedules/schedule_tiny_pretrain.py',
    '../_base_/runtime_pretrain.py',
]

model = dict(backbone=dict(type='mmdet.SASAResNet', out_indices=(3,)))
