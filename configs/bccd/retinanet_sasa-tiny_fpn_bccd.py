_base_ = ['./retinanet_tiny_bccd.py', '../_base_/attention_tiny.py']

model = dict(backbone={{_base_.attn_backbone}})
