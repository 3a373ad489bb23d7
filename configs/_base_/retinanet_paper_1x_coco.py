# RetinaNet as the paper has it, as far as it can be told: P6 is made of P5. At mmdet's 1x schedule.
_base_ = './retinanet_r50_fpn_1x_coco.py'

model = dict(neck=dict(add_extra_convs='on_output'))
