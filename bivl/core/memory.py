"""How the C library hands out memory, where arrays lie in the host's own."""

import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import sys

import jax

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_AHEAD = 2**26  # bytes asked of the system beyond what is wanted
_DONTNEED = 4  # of Linux's madvise
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")
_SMALL = 1040  # bytes; below, glibc has a list for each size and looks for none
_state = {"kept": False}  # of this process


def keep() -> bool:
    """Lets this process keep what it has freed, so that the next step finds its memory there.

    glibc gives every array of more than 32 MiB back to the system and asks for it again, whose
    pages are then cleared one by one as they are first touched: a quarter of a step's time on the
    CPU. The process holds its peak until it ends. To be called before the devices are asked for
    anything: a thread that has its own arena by then goes on with the system. Returns whether
    anything was changed: not where there may be other devices than the CPU, the C library is
    another one, or the environment has settings of its own.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return False
    if not _cpu_alone():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _AHEAD, _ARENA_MAX: 1}
    _state["kept"] = all([mallopt(name, value) for name, value in settings.items()])
    return _state["kept"]


def settle() -> int:
    """Fills the holes that a compiler left, for good, and gives their pages back to the system.

    Those of a large program are a gigabyte in 160,000 pieces of all sizes, and glibc looks through
    them for each array of a step, a fifth of its time and more. To be called between compiling and
    the first step. Returns the bytes that were filled, 0 where `keep` changed nothing.
    """
    library = ctypes.CDLL(None)
    if not _state["kept"] or not hasattr(library, "mallinfo2"):  # glibc 2.33 and newer
        return 0
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    library.malloc.argtypes, library.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mallinfo2.restype = _Info
    top = library.sbrk(0) - library.mallinfo2().keepcost  # where memory is in one piece again
    size, filled = _AHEAD, 0
    while size > _SMALL:
        place = library.malloc(size)
        if place is None or place >= top:
            library.free(place)
            size = size * 3 // 4
            continue
        filled += size
        first = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (place + size - first) // mmap.PAGESIZE
        if pages > 0:
            library.madvise(first, pages * mmap.PAGESIZE, _DONTNEED)
    return filled


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _cpu_alone() -> bool:
    """Whether jax will have no other devices; it is not asked, for that would start its threads."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
