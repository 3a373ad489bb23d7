# Each part of a detector with the attention of the paper.
_base_ = './attn_cfg.py'

attn_backbone = dict(
    attn_cfg={{_base_.attn_cfg}},
    # mmdet freezes the first stage and all batch norm statistics at their ImageNet values. Those of
    # the stem and the 1x1 convolutions are loaded, but attention is new, and all after it must learn.
    frozen_stages=-1,
    norm_eval=False,
)
attn_neck = dict(attn_cfg={{_base_.attn_cfg}})
attn_head = dict(attn_cfg={{_base_.attn_cfg}})
# For any part of mmdet that has a conv_cfg.
attn_conv_cfg = dict(type='SASA', attn_cfg={{_base_.attn_cfg}})

# Batch norm over two images a GPU is too noisy. Applies to distributed training only.
sync_bn = 'torch'

# Logits are not scaled, and FPN and head have no norm: clipping bounds what a first step can do.
attn_optim = dict(clip_grad=dict(max_norm=35, norm_type=2))
