# The attention of the tiny model, for each of its parts.
attn_backbone = dict(attn_cfg=dict(kernel_size=5, num_heads=4, bias=True))
# The paper's small initial values: a normalisation follows each.
pyramid_attn_cfg = dict(kernel_size=5, num_heads=4, bias=True, value_std=0.01)
attn_neck = dict(attn_cfg=pyramid_attn_cfg)
# The predictors stay 3x3 convolutions, one reading of the paper. As attention and pointwise
# convolution they take far longer to tell classes apart.
attn_head = dict(attn_cfg=pyramid_attn_cfg, attn_parts=('cls', 'reg'))
