_base_ = '../_base_/retinanet_paper_1x_coco.py'
