_base_ = ['../bccd/retinanet_tiny_bccd.py', '../_base_/attention_tiny.py']

model = dict(neck={{_base_.attn_neck}}, bbox_head={{_base_.attn_head}})
