_base_ = ['./r50_32xb128-130e_in1k.py', '../_base_/attn_cfg.py']

model = dict(backbone=dict(attn_cfg={{_base_.attn_cfg}}))
