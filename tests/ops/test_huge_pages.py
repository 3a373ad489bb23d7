"""Huge pages, as Linux says which maps may have them."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from sasa_det.ops import available_backends, local_attention
from sasa_det.ops.huge_pages import with_huge_pages

pytestmark = pytest.mark.skipif(
    not Path('/sys/kernel/mm/transparent_hugepage').exists(),
    reason='no transparent huge pages here',
)


def may_be_huge(begin: int, end: int) -> list:
    """List what of a range of addresses was asked to have huge pages."""
    found, bounds = [], (0, 0)
    for line in Path('/proc/self/smaps').read_text().splitlines():
        mapping = re.match(r'([0-9a-f]+)-([0-9a-f]+) ', line)
        if mapping:
            bounds = max(int(mapping[1], 16), begin), min(int(mapping[2], 16), end)
        elif line.startswith('VmFlags:') and bounds[0] < bounds[1] and 'hg' in line.split():
            found.append(bounds)
    return found


@pytest.fixture
def fresh():
    """Memory that nobody has asked huge pages for, as the C library's may be."""
    x = torch.frombuffer(mmap.mmap(-1, 2**24), dtype=torch.uint8)
    assert not may_be_huge(x.data_ptr(), x.data_ptr() + len(x))
    return x


@pytest.mark.parametrize('size', [2**22, 2**22 + 4096, 2**23 + 12345])
def test_asks_for_whole_pages_of_a_map_alone(fresh, size):
    x = fresh[4096:][:size]
    assert with_huge_pages(x) is x
    begin, end = x.data_ptr(), x.data_ptr() + size
    first, last = -(-begin // 2**21) * 2**21, end // 2**21 * 2**21
    assert may_be_huge(fresh.data_ptr(), fresh.data_ptr() + len(fresh)) == [(first, last)]


@pytest.mark.parametrize('size', [0, 1, 2**21, 2**22 - 1])
def test_small_maps_are_left_alone(fresh, size):
    with_huge_pages(fresh[:size])
    assert not may_be_huge(fresh.data_ptr(), fresh.data_ptr() + len(fresh))


@pytest.mark.skipif(available_backends()['native'] is not None, reason='no native kernels here')
def test_large_outputs_have_them():
    # More than the C library hands out again.
    x = torch.zeros(1, 64, 512, 512)
    with torch.no_grad():
        y = local_attention(x, x, x, kernel_size=3, num_heads=1, backend='native')
    begin, end = y.data_ptr(), y.data_ptr() + y.nbytes
    assert sum(b - a for a, b in may_be_huge(begin, end)) >= y.nbytes - 2**22


def test_fake_tensors_have_no_pages():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(1, 64, 1024, 1024)
        assert with_huge_pages(x) is x
