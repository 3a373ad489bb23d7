# The attention of the paper (arXiv 1906.05909). It does not say whether projections have a bias; with
# one, each head starts out at a neighbour of its own.
attn_cfg = dict(kernel_size=7, num_heads=8, bias=True)
