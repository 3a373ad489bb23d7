# ResNet-50 as an ImageNet classifier of mmpretrain; configs that inherit it change depth, stem and attention.
custom_imports = dict(imports=['sasa_det'])

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type='mmdet.SASAResNet',
        depth=50,
        out_indices=(3,),
        # The paper's decay of batch norm's statistics is 0.9999; torch's momentum is one minus the decay.
        norm_cfg=dict(type='BN', momentum=0.0001, requires_grad=True),
        norm_eval=False,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
    ),
)
