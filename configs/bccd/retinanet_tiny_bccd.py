# BCCD (https://github.com/Shenggan/BCCD_Dataset, MIT): blood cells under a microscope, 640 x 480.
_base_ = '../quickstart/retinanet_tiny_coco-format.py'

data_root = 'data/bccd/'
metainfo = dict(classes=('Platelets', 'RBC', 'WBC'))

# A cell has no upright orientation.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomChoiceResize', scales=[(288, 288), (320, 320), (352, 352)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=4, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

# Cells are round.
model = dict(bbox_head=dict(num_classes=3, anchor_generator=dict(ratios=[1.0])))

optim_wrapper = dict(optimizer=dict(lr=0.008))  # for a batch of 4

# After 12 epochs attention is still behind.
max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=6)
param_scheduler = _base_.param_scheduler
param_scheduler[1]['end'] = max_epochs
