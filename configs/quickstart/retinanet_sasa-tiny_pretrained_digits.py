# Starts from the weights of configs/pretrain/sasa-tiny_digit-crops.py.
_base_ = './retinanet_sasa-tiny_digits.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/sasa-tiny_digit-crops/epoch_8.pth',
            prefix='backbone.',
        )
    )
)
