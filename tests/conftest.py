"""What has to be said before any test imports anything."""

import os

import pytest
import torch
from needs_torch import why_not

# Without a GPU the Triton kernels run under Triton's interpreter, which it decides on when it is imported.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'
# On a GPU torch refuses to multiply matrices deterministically, as tests/ops/ asks for, without this.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')


def pytest_collection_modifyitems(items):
    """Skip what this torch cannot do, with the reason."""
    for item in items:
        reason = why_not(item.nodeid, torch.__version__)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
