# The attention of the tiny model, and each of its parts with it.
attn_cfg = dict(kernel_size=5, num_heads=4, bias=True)

attn_backbone = dict(attn_cfg=attn_cfg)
attn_neck = dict(attn_cfg=attn_cfg)
attn_head = dict(attn_cfg=attn_cfg)
