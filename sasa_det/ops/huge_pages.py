"""Huge pages for large maps on the CPU: allocating 4 KB pages may take longer than computing a map."""

from torch import Tensor

from .native_library import load

# None if there is no library; the eager backend is slow for other reasons.
_native, _ = load()


def with_huge_pages(x: Tensor) -> Tensor:
    """Ask the Linux kernel to back a new, unwritten tensor by huge pages.

    Linux allocates and clears a page at its first write, 4 KB at a time unless it is asked for more. This is
    only a hint: its effect depends on /sys/kernel/mm/transparent_hugepage/enabled.

    Args:
        x: A dense tensor; left as it is if it is small, fake, on a GPU, or not on Linux.

    Returns:
        The same tensor.

    Examples:
        >>> import torch
        >>> with_huge_pages(torch.empty(4, 256, 100, 168)).shape
        torch.Size([4, 256, 100, 168])
    """
    # Subclasses of Tensor, such as torch's fake tensors, may have no memory.
    if _native is not None and x.device.type == 'cpu' and type(x) is Tensor:
        if x.nbytes >= _native.HUGE_FROM:
            _native.ask_for_huge_pages(x.data_ptr(), x.nbytes)
    return x
