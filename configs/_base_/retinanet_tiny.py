# A RetinaNet for images of 200 to 300 px that trains from scratch on a laptop's CPU in minutes. As
# in the large one, every part is a convolution unless it gets attn_cfg.
custom_imports = dict(imports=['sasa_det'])

# For two processes on a CPU as well as on GPUs. In training, buffers of batch norm are the first
# process's. For validation and the checkpoint they are the mean over all.
model_wrapper_cfg = dict(type='AnyDeviceDistributedDataParallel', broadcast_buffers=True)
custom_hooks = [dict(type='SyncBuffersHook')]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='SASAResNet',
        depth=26,
        base_channels=16,
        # Three 3x3 convolutions: raw pixels hold too little content for attention.
        deep_stem=True,
        stem_channels=32,
        norm_cfg=norm_cfg,
        norm_eval=False,
        zero_init_residual=False,
    ),
    neck=dict(
        type='SASAFPN',
        in_channels=[64, 128, 256, 512],
        out_channels=64,
        start_level=1,
        add_extra_convs='on_output',
        num_outs=4,
        norm_cfg=norm_cfg,
    ),
    bbox_head=dict(
        type='SASARetinaHead',
        num_classes=80,
        in_channels=64,
        feat_channels=64,
        stacked_convs=4,
        # All levels share the weights but not their batch statistics, so the norm uses none.
        norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=2,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64],
        ),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0],
        ),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0,
            ignore_iof_thr=-1,
        ),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=100,
    ),
)
