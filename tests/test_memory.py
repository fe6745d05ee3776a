"""The allocator's hint."""

import sys

import pytest

from sightline import memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_freed_blocks_stay_in_the_heap():
    """In a process of its own: 16 MB, freed and asked for again, lie at the same place and are still in memory."""
    import subprocess

    code = """
import ctypes, sys
from sightline.memory import keep_freed
if len(sys.argv) > 1: print(keep_freed())
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p; libc.malloc.argtypes = [ctypes.c_size_t]; libc.free.argtypes = [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
block = libc.malloc(16 << 20); ctypes.memset(block, 1, 16 << 20); full = resident(); libc.free(block)
print(full - resident() < 8 << 20)
"""
    kept, given_back = (
        subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=True).stdout.split()
        for more in (["keep"], [])
    )
    assert kept == ["True", "True"]
    assert given_back == ["False"]


def test_elsewhere_it_does_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep_freed() is False
