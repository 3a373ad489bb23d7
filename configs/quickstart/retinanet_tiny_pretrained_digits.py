# From the weights that configs/pretrain/tiny_digit-crops.py leaves behind.
_base_ = './retinanet_tiny_digits.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/tiny_digit-crops/epoch_8.pth',
            prefix='backbone.',
        )
    )
)
