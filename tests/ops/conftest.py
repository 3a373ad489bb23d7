import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Have torch.empty give NaN, so that a result left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
