"""PyTorch on one thread: sums in the same order at every run, and no more threads than cores."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    pytest.importorskip("torch").set_num_threads(1)
