"""The C allocator, on a CPU: what tensors leave in its heap goes back to the system."""

import ctypes
import functools

WHOLE_PAGES = 2**20  # bytes from which on memory is got from the system, and given back, by itself
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@functools.cache
def give_back_freed() -> None:
    """
    Have tensors of a MiB or more leave the process's memory when they are freed, from now on.

    Otherwise glibc raises that size as it sees tensors freed, and puts larger ones into its heap, where gaps stay. For
    tensors that come and go with each layer that can be several times as much memory as they take. Without
    glibc nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another library, or system
        return
    mallopt(_M_MMAP_THRESHOLD, WHOLE_PAGES)
