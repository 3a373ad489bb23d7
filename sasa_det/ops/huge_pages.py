"""Huge pages for large maps on the CPU: small ones may take longer to come than a map to compute."""

from torch import Tensor

try:
    from ._native import ask_for_huge_pages
except ImportError:  # not built; eager alone is slow for other reasons
    ask_for_huge_pages = None


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
    # What is no plain tensor, such as torch's fake ones, may have no memory.
    if ask_for_huge_pages is not None and x.device.type == 'cpu' and type(x) is Tensor:
        ask_for_huge_pages(x)
    return x
