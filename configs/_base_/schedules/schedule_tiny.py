# AdamW with a short warm-up, a cosine and gradient clipping, which keep unscaled logits stable at the start.
max_epochs = 8
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.007, weight_decay=0.05),
    clip_grad=dict(max_norm=10, norm_type=2),
    # Query, key and position weights learn at a tenth of the rate. Adam's steps are of one size for
    # all weights, and unscaled logits add up the steps of two projections.
    paramwise_cfg=dict(
        custom_keys={name: dict(lr_mult=0.1) for name in ('query', 'key', 'rel_row', 'rel_col')}
    ),
)

randomness = dict(seed=0)
default_scope = 'mmdet'
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=25),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='WholeCheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='EpochSeedHook'),
    collect_dir=dict(type='CollectDirHook'),
    gpu=dict(type='GpuHook'),
    visualization=dict(type='DetVisualizationHook'),
)
env_cfg = dict(
    cudnn_benchmark=True,  # images have few sizes
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=25, by_epoch=True)
log_level = 'INFO'
load_from = None
resume = False
