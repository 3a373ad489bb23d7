# The paper's schedule: 130 epochs with Nesterov momentum and an average of the weights. For a batch
# of 4,096 the learning rate reaches 1.6 after 10 epochs of linear warm-up, then follows a cosine.
# The paper does not give weight decay and momentum; they are ResNet's here.
train_cfg = dict(by_epoch=True, max_epochs=130, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=1.6, momentum=0.9, nesterov=True, weight_decay=0.0001)
)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=10,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR', T_max=120, by_epoch=True, begin=10, end=130,
        convert_to_iter_based=True,
    ),
]  # fmt: skip
auto_scale_lr = dict(base_batch_size=4096)
custom_hooks = [dict(type='EMAHook', momentum=0.0001, priority='ABOVE_NORMAL')]
