# The attention of the paper (arXiv 1906.05909), which does not speak of a bias or of how weights start.
# Here each head first looks at another neighbour; the bias of the queries is what points it there.
attn_cfg = dict(kernel_size=7, num_heads=8, bias=True, init='neighbours')
