_base_ = ['../bccd/retinanet_tiny_bccd.py', '../_base_/dwconv_tiny.py']

model = dict(
    backbone={{_base_.dwconv_backbone}},
    neck={{_base_.dwconv_neck}},
    bbox_head={{_base_.dwconv_head}},
)
