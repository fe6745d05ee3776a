"""Memory. A hint to the allocator that makes work on the CPU faster."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's settings (malloc.h)."""

LARGEST, AHEAD = 32 << 20, 256 << 20
"""Bytes: blocks up to here come from the heap, which grows by so much at once."""


def keep_freed() -> bool:
    """Let glibc keep freed memory for the next request instead of giving it back to the system at once.

    A forward pass asks for the same few megabytes again and again; without this each of them is mapped, zeroed page by
    page, and unmapped. For the whole process, for good: for programs, not for libraries. Returns whether it took
    effect; elsewhere than on glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: AHEAD}
    taken = [mallopt(name, value) for name, value in settings.items()]
    return all(answer == 1 for answer in taken)
