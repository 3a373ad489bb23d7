# The attention of the tiny model, and each of its parts with it.
attn_backbone = dict(attn_cfg=dict(kernel_size=5, num_heads=4, bias=True, init='neighbours'))
# The paper's small values: a normalisation follows each.
pyramid_attn_cfg = dict(kernel_size=5, num_heads=4, bias=True, init='neighbours', value_std=0.01)
attn_neck = dict(attn_cfg=pyramid_attn_cfg)
# The predictors stay 3x3 convolutions, which is one reading of the paper. As attention and pointwise
# convolution they take far longer until they tell classes apart.
attn_head = dict(attn_cfg=pyramid_attn_cfg, attn_parts=('cls', 'reg'))
