_base_ = ['./tiny_digit-crops.py', '../_base_/attention_tiny.py']

model = dict(backbone={{_base_.attn_backbone}})
