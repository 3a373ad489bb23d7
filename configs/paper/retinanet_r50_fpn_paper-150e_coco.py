_base_ = '../_base_/retinanet_paper_150e_coco.py'

sync_bn = 'torch'  # as in the rows with attention
