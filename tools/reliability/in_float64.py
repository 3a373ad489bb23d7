"""Makes torch's default type float64 in a process whose config imports this: a model built there has it."""

import torch

torch.set_default_dtype(torch.float64)
