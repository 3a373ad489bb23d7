# The paper's attention in RetinaNet, as far as parameters and FLOPs of its Table 2 determine it. This
# reading fits best of all: docs/paper.md.
_base_ = './attention.py'

attn_neck = dict(add_extra_convs='on_input', attn_cfg=dict(out_proj=True))
attn_head = dict(attn_cfg=dict(out_proj=True), predictor='pointwise')
