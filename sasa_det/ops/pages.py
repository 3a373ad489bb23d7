"""Huge pages for large maps on the CPU: small ones may take longer to come than a map to compute."""

import ctypes
import sys

from torch import Tensor

# As large as a huge page of x86 and of most of arm64's kernels.
_HUGE = 2**21
# What is smaller comes from memory that was used before, as a rule.
_LEAST = 2**22
_MADV_HUGEPAGE = 14


def _find_madvise():
    if sys.platform != 'linux':
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


_MADVISE = _find_madvise()


def with_huge_pages(x: Tensor) -> Tensor:
    """Ask the kernel to back a new tensor, to which nothing was written yet, by huge pages.

    A page comes when it is first written, cleared, and Linux does so for 4 KB at a time unless it is asked for
    more. A hint: whether it is taken depends on /sys/kernel/mm/transparent_hugepage/enabled.

    Args:
        x: A dense tensor; left as it is where it is small, fake, on a GPU, or not on Linux.

    Returns:
        The same tensor.

    Examples:
        >>> import torch
        >>> with_huge_pages(torch.empty(4, 256, 100, 168)).shape
        torch.Size([4, 256, 100, 168])
    """
    size = x.numel() * x.element_size()
    # What is no plain tensor, such as torch's fake ones, may have no memory.
    if _MADVISE is None or size < _LEAST or x.device.type != 'cpu' or type(x) is not Tensor:
        return x
    first = -(-x.data_ptr() // _HUGE) * _HUGE
    last = (x.data_ptr() + size) // _HUGE * _HUGE
    _MADVISE(first, last - first, _MADV_HUGEPAGE)
    return x
