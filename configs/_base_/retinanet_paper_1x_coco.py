# The paper's RetinaNet, as far as it is known, at mmdet's 1x schedule: P6 is computed from P5.
_base_ = './retinanet_r50_fpn_1x_coco.py'

model = dict(neck=dict(add_extra_convs='on_output'))
