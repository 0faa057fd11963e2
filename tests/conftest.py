"""Eight forced host devices, one thread pool, parsed absl flags: set before jax starts."""

import gc
import os
from pathlib import Path

# Nearly all time of these tests is compile time: level 0 halves it, and the cache lets workers of
# pytest, programs that tests start and the next run share what is compiled.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{Path(__file__).parents[1]}/.pytest_cache/compiled"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()
gc.set_threshold(100_000, 20, 20)  # a sixth of the time of tracing and compiling, as it comes
jax.config.update("jax_numpy_rank_promotion", "allow")

# First, so that no worker ends with one.
SLOWEST = ("pretrain", "pods", "processes", "train", "finetune")


def pytest_configure(config):
    """Keeps xdist from starting the files with the most tests first: they are the quick ones."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOWEST)


@pytest.fixture
def tiny_config():
    """A data2vec image config small enough to compile in a second or two."""
    import runs

    return runs.tiny()


@pytest.fixture
def one_device(monkeypatch):
    """Training on one device, which is quicker to compile for than eight."""
    import functools

    from bivl import train

    monkeypatch.setattr(train, "build", functools.partial(train.build, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def quick_compile(tmp_path_factory):
    """Compiles with few optimizations, and every program once for all tests of a module."""
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    old = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in old.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
