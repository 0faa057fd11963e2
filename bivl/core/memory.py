"""How the C library hands out memory, where arrays lie in the host's own."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jax

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_AHEAD = 2**26  # bytes asked of the system beyond what is wanted
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


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
    return all([mallopt(name, value) for name, value in settings.items()])


def _cpu_alone() -> bool:
    """Whether jax will have no other devices; it is not asked, for that would start its threads."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
