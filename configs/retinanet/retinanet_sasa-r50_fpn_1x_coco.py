_base_ = ['../_base_/retinanet_r50_fpn_1x_coco.py', '../_base_/attention.py']

model = dict(backbone={{_base_.attn_backbone}})
optim_wrapper = {{_base_.attn_optim}}
