# The paper's attention for each part of a detector.
_base_ = './attn_cfg.py'

attn_backbone = dict(
    attn_cfg={{_base_.attn_cfg}},
    # mmdet freezes the first stage and all batch norm statistics at their ImageNet values. Here only
    # the stem and the 1x1 convolutions have such values. Attention is new, so all layers after it
    # must learn.
    frozen_stages=-1,
    norm_eval=False,
)
attn_neck = dict(attn_cfg={{_base_.attn_cfg}})
attn_head = dict(attn_cfg={{_base_.attn_cfg}})
# For any part of mmdet that takes a conv_cfg.
attn_conv_cfg = dict(type='SASA', attn_cfg={{_base_.attn_cfg}})

# Batch norm over two images per GPU is too noisy. This applies to distributed training only.
sync_bn = 'torch'

# Logits are not scaled, and neck and bbox_head have no norm, so clipping bounds the first steps.
attn_optim = dict(clip_grad=dict(max_norm=35, norm_type=2))
