"""How a process that works on a CPU treats its memory."""
import ctypes
import os
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


@cache
def keep_memory():
    """What is freed stays with the process: feature maps in new pages at each update cost up to a third of its time.

    To be called while there is one thread: another would have a heap of its own, with no room for large maps.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):  # other C libraries have their own ways
        for key, value in (M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1):
            libc.mallopt(key, value)
        os.register_at_fork(before=lambda: libc.malloc_trim(0))  # loader processes would hold what this one overwrites
