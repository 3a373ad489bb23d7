import pytest
import torch


@pytest.fixture
def images():
    """A batch that no stride divides evenly."""
    return torch.rand(2, 3, 67, 93, generator=torch.Generator().manual_seed(0)) * 255
