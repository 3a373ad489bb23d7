import pytest
import torch

from sasa_det.ops.native_library import load


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Have torch.empty give NaN, so that a result left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_stub_left():
    """Forget the CUDA kernels that a stub of the driver had registered."""
    yield
    library, _ = load()
    if library is not None:
        library.cuda_forget()
