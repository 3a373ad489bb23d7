_base_ = [
    '../_base_/classifier_r50.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_130e_imagenet.py',
    '../_base_/runtime_pretrain.py',
]
