_base_ = ['./retinanet_tiny_digits.py', '../_base_/attention_tiny.py']

model = dict(backbone={{_base_.attn_backbone}})
