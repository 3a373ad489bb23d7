_base_ = '../_base_/retinanet_r50_fpn_1x_coco.py'
