_base_ = [
    '../_base_/retinanet_tiny.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/schedule_tiny.py',
]

# A digit is 1.5 times as high as wide.
model = dict(bbox_head=dict(num_classes=10, anchor_generator=dict(ratios=[1.5])))
