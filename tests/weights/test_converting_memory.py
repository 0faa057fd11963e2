"""Files of weights and models are never in memory as a whole."""

import filecmp
import functools
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest

from bivl import convert, model
from bivl.core import config as configs
from bivl.core.piecemeal import Deferred
from bivl.weights import export
from bivl.weights.export import Export, Origin
from bivl.weights.incoming import shapes
from bivl.weights.rules import Rule, pair

FLOAT = np.dtype(np.float32)
TABLE = (
    *(Rule(f"{{n}}.qkv.bias[{i}/3]", f"blocks/{part}[n]") for i, part in enumerate("qkv")),
    *pair("{n}.fc", "blocks/fc[n]"),
    Rule("words", "words"),
)
OURS = {f"blocks/{part}": (4, 3) for part in "qkv"}
OURS |= {"blocks/fc/kernel": (4, 3, 6), "blocks/fc/bias": (4, 6), "words": (9, 3)}
PEAK = """
import sys
from bivl import convert
def peak():  # of this program alone, which getrusage's is not
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))
peaks = []
for name in ("small", "large"):
    theirs, ours, back = (f"{sys.argv[1]}/{name}{part}" for part in ("", "_ours", "_back"))
    convert.main([f"--source={theirs}", f"--out={ours}"])
    convert.main([f"--source={theirs}", f"--out={back}", "--to=huggingface"])
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


def test_an_export_reads_every_array_once_and_keeps_what_its_tensors_share():
    read, alive = [], {}

    def make(path):
        read.append(path)
        array = np.random.default_rng(len(path)).random(OURS[path], np.float32)
        alive[path] = weakref.ref(array)
        return array

    arrays = {k: Deferred(s, FLOAT, functools.partial(make, k)) for k, s in OURS.items()}
    made = Export({"model_type": "x"}, TABLE)
    tensors = export.folder(made, arrays, Origin(), {}, {}).tensors
    assert not read and set(tensors) == {
        "words",
        *(f"{n}.{name}" for n in range(4) for name in ("qkv.bias", "fc.weight", "fc.bias")),
    }
    for name, tensor in tensors.items():
        value = tensor.read()
        held = {path for path, ref in alive.items() if ref() is not None}
        assert len(held) == (3 if "qkv" in name else 1), name
        assert value.shape == tensor.shape and value.dtype == tensor.dtype == FLOAT
    assert sorted(read) == sorted(OURS)


def written(folder, width):
    """A CLIP as transformers stores it."""
    sizes = {"width": width, "depth": 6, "num_heads": 8, "mlp_dim": 4 * width}
    changes = {f"{tower}.{k}": v for tower in ("model", "model.text") for k, v in sizes.items()}
    config = configs.load(f"{convert.CONFIGS}/pretrain/clip.py:smoke")
    configs.override(config, [(key, str(value)) for key, value in changes.items()])
    ours, _ = shapes(model.make_objective(config))
    make = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    arrays = {k: Deferred(s, FLOAT, functools.partial(make, s)) for k, s in ours.items()}
    made = (function(config, ours, Origin()) for function in convert.exporters("huggingface"))
    made = next(filter(None, made))
    folder.mkdir()
    tensors = export.folder(made, arrays, Origin(), {}, {}).tensors
    export.write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(made.config))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_a_file_is_never_in_memory_as_a_whole(tmp_path):
    """One of 170 MB takes 150 more than one of 3 MB, most of it a cache of TensorStore's that does
    not grow further; as a whole it would be 170 more."""
    written(tmp_path / "small", 64)
    written(tmp_path / "large", 512)
    command = [sys.executable, "-c", PEAK, tmp_path]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    more = int(found.stdout.splitlines()[-1])
    theirs, back = (tmp_path / n / "model.safetensors" for n in ("large", "large_back"))
    assert more < 1.5 * theirs.stat().st_size
    assert filecmp.cmp(theirs, back, shallow=False)
