_base_ = ['../_base_/retinanet_paper_150e_coco.py', '../_base_/attention_paper.py']

model = dict(backbone={{_base_.attn_backbone}})
optim_wrapper = {{_base_.attn_optim}}
