# The attention of the paper (arXiv 1906.05909). It does not say whether projections have a bias; with
# one, attention starts out looking at its own pixel.
attn_cfg = dict(kernel_size=7, num_heads=8, bias=True)
