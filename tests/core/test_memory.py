"""Memory that a process keeps; in processes of their own, for it cannot be undone."""

import os
import platform
import subprocess
import sys

import pytest

# Whether pages are new to the process shows in how many faults a second array of its size costs.
PROGRAM = """
import resource
import numpy as np
from bivl.core import memory
changed = memory.keep()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
before = faults()
np.ones(2**24)
print(changed, faults() - before)
"""


def run(**settings):
    """-> (what `keep` says, page faults of an array of 128 MiB whose like was freed before)."""
    names = ("GLIBC_TUNABLES", "LD_PRELOAD")
    env = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, env=env | settings, capture_output=True, text=True, check=True)
    changed, faults = out.stdout.split()
    return changed == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_and_the_environment_goes_first():
    changed, faults = run()
    assert changed and faults < 100
    changed, faults = run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert not changed and faults > 10
