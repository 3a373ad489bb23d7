_base_ = [
    '../_base_/retinanet_tiny.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/schedule_tiny.py',
]

model = dict(bbox_head=dict(num_classes=10))
