# The paper's recipe on COCO: 150 epochs at batch 64 (8 GPUs of 8 images). The learning rate rises to
# 0.12 in one epoch, then follows a cosine. Augmentation is multi-scale jitter, crop to 640 and flip.
# The paper does not give the jitter's range, which is NAS-FPN's here. Nor does it give optimizer,
# weight decay and initialisation, which are mmdet's.
_base_ = './retinanet_paper_1x_coco.py'

image_size = (640, 640)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type='RandomCrop', crop_size=image_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(batch_size=8, num_workers=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

model = dict(
    data_preprocessor=dict(
        pad_size_divisor=64, batch_augments=[dict(type='BatchFixedSizePad', size=image_size)]
    ),
    # No row has frozen stages, so that the rows differ in attention alone.
    backbone=dict(frozen_stages=-1, norm_eval=False),
)

# Images are padded to few sizes, so cuDNN finds its fastest convolution for each only once.
env_cfg = dict(cudnn_benchmark=True)

train_cfg = dict(max_epochs=150, val_interval=10)
optim_wrapper = dict(optimizer=dict(lr=0.12))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR', T_max=149, by_epoch=True, begin=1, end=150,
        convert_to_iter_based=True,
    ),
]  # fmt: skip
auto_scale_lr = dict(base_batch_size=64)
