"""How the C library hands out memory, where arrays lie in the host's own."""

import ctypes
import os
import sys

import jax

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_AHEAD = 2**26  # bytes asked of the system beyond what is wanted
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def keep() -> bool:
    """Lets this process keep what it has freed, so that the next step finds its memory there.

    glibc gives every array of more than 32 MiB back to the system and asks for it again, whose
    pages are then cleared one by one as they are first touched: an eighth to a quarter of a step's
    time on the CPU. The process holds its peak until it ends. Returns whether anything was changed:
    not where arrays lie on other devices, the C library is another one, or the environment has
    settings of its own.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return False
    if jax.default_backend() != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, _AHEAD)])
