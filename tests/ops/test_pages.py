"""Huge pages, as Linux says which maps may have them."""

import re
from pathlib import Path

import pytest
import torch

from sasa_det.ops.pages import with_huge_pages

pytestmark = pytest.mark.skipif(
    not Path('/sys/kernel/mm/transparent_hugepage').exists(),
    reason='no transparent huge pages here',
)


def may_be_huge(address: int) -> bool:
    """Say whether the mapping around an address was asked to have huge pages."""
    inside = False
    for line in Path('/proc/self/smaps').read_text().splitlines():
        bounds = re.match(r'([0-9a-f]+)-([0-9a-f]+) ', line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith('VmFlags:'):
            return 'hg' in line.split()
    raise AssertionError(f'no mapping around {address:x}')


def test_large_maps_may_have_huge_pages():
    # More than the C library hands out again, so that nobody has asked for its pages before.
    x = torch.empty(1, 64, 1024, 1024)
    middle = x.data_ptr() + x.numel() * x.element_size() // 2
    assert not may_be_huge(middle)
    assert with_huge_pages(x) is x
    assert may_be_huge(middle)


@pytest.mark.parametrize('size', [0, 1, 2**21, 2**22 - 1])
def test_small_maps_are_left_alone(size, monkeypatch):
    def refuse(*args):
        raise AssertionError(f'madvise{args}')

    monkeypatch.setattr('sasa_det.ops.pages._MADVISE', refuse)
    assert with_huge_pages(torch.empty(size, dtype=torch.uint8)).numel() == size


def test_fake_tensors_have_no_pages():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(1, 64, 1024, 1024)
        assert with_huge_pages(x) is x


def test_asks_for_whole_pages_of_its_own_alone(monkeypatch):
    asked = []
    monkeypatch.setattr('sasa_det.ops.pages._MADVISE', lambda *args: asked.append(args))
    x = torch.empty(2**22 + 4096, dtype=torch.uint8)
    with_huge_pages(x)
    [(first, size, _)] = asked
    assert first % 2**21 == size % 2**21 == 0 and size >= 2**22 - 2**21
    assert x.data_ptr() <= first and first + size <= x.data_ptr() + x.numel()
