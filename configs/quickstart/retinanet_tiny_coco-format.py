# For one's own COCO-format data. `sasa-det coco-config` writes a config that names the data and its
# classes. It inherits from this config or its all-attention sibling.
_base_ = './retinanet_tiny_digits.py'

image_scale = (320, 320)
train_pipeline = _base_.train_pipeline
train_pipeline[2]['scale'] = image_scale
train_pipeline.insert(3, dict(type='RandomFlip', prob=0.5))
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = image_scale
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(bbox_head=dict(anchor_generator=dict(ratios=[0.5, 1.0, 2.0])))
