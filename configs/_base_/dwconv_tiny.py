# Depthwise-separable 5x5 convolutions in the place of the tiny model's attention. Wider by an eighth,
# it has as many parameters as the one with attention in all parts.
conv_cfg = dict(type='DepthwiseSeparable', window=5)
dwconv_backbone = dict(
    base_channels=18,
    # mmdet's way to replace the 3x3s of the stages alone. A conv_cfg would replace the stem's, too.
    dcn=conv_cfg,
    stage_with_dcn=(True, True, True, True),
)
dwconv_neck = dict(in_channels=[72, 144, 288, 576], out_channels=72, conv_cfg=conv_cfg)
dwconv_head = dict(
    in_channels=72,
    feat_channels=72,
    conv_cfg=conv_cfg,
    # RetinaNet's 0.01 is for a dense 3x3 convolution. Two such factors would leave next to nothing.
    init_cfg=dict(
        type='Kaiming',
        layer='Conv2d',
        override=[
            dict(type='Normal', name='retina_cls', std=0.01, bias_prob=0.01),
            dict(type='Normal', name='retina_reg', std=0.01),
        ],
    ),
)
