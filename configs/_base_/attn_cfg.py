# The attention of the paper (arXiv 1906.05909), which gives neither a bias nor an initialisation. Here
# each head starts at a different neighbour, to which the query bias points it.
attn_cfg = dict(kernel_size=7, num_heads=8, bias=True)
