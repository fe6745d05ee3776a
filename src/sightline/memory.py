"""Memory. What makes work on the CPU faster: a hint to the allocator, and how much to do at once."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's settings (malloc.h)."""

LARGEST, AHEAD = 32 << 20, 256 << 20
"""Bytes: blocks up to here come from the heap, which grows by so much at once."""


AT_ONCE, MOST = 8 * 224 * 224, 64
"""Pixels and images: what a CPU likes to have in a network at a time, and what is enough for any device."""


def at_once(h: int, w: int, device: str) -> int:
    """Return how many images of h x w pixels to put through a network together, by the kind of device.

    On a CPU what a layer gives should stay near the cache, and below the size from which memory is mapped anew at every
    request: ResNet-50 at 224 takes 1.6 times as long an image in chunks of 64 as in chunks of 8.
    """
    return MOST if device != "cpu" else min(MOST, max(4, AT_ONCE // (h * w)))


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
