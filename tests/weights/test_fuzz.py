"""Damaged files of every kind end in one line, or hold what they held."""

import datetime
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weight_writers import (
    Strided,
    instance,
    name,
    safetensors,
    torch_legacy,
    torch_zip,
    written,
)

from bivl.core.errors import UserError
from bivl.weights.admitted import BadPickle
from bivl.weights.files import open_weights
from bivl.weights.unpickle import unpickle

BASE = np.arange(40, dtype=np.float32)
VALUE = {
    "model": {
        "a.weight": BASE.reshape(5, 8),
        "a.bias": np.ones(8, np.float16),
        "view": Strided(BASE, (8, 5), (1, 8)),
        "_ema": {"a.weight": np.zeros((5, 8), np.float32)},
    },
    "args": instance(name("argparse", "Namespace"), lr=0.1, betas=(0.9, 0.98), names=["a", None]),
    "epoch": 3,
}
FLAT = {"a": BASE, "b": np.ones((2, 3), np.float16), "c": np.int64([[1], [2]])}
# An example takes milliseconds; whoever hangs, or allocates without bound, takes this long.
EXAMPLES = settings(
    max_examples=170,  # of each of six kinds: a thousand files
    deadline=datetime.timedelta(seconds=20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(path):
    """name -> array of every part of a file, or None where it is refused, in one line."""
    try:
        weights = open_weights(path)
        return {
            f"{part}/{key}": tensor.read()
            for part, tensors in weights.parts.items()
            for key, tensor in tensors.items()
        }
    except UserError as error:
        line = str(error)
        assert line.startswith(f"weights {path}") and line.isprintable() and "; " in line, line
        return None


def equal(found, expected):
    return list(found) == list(expected) and all(
        found[key].dtype == array.dtype and np.array_equal(found[key], array)
        for key, array in expected.items()
    )


PLACES = st.floats(0, 1, exclude_max=True)  # fractions of a file's length
DAMAGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
        st.tuples(st.just("byte"), PLACES, st.integers(0, 255)),
        st.tuples(st.just("large"), PLACES, st.sampled_from([1, 2, 4, 8])),
        st.tuples(st.just("insert"), PLACES, st.binary(max_size=20)),
        st.tuples(st.just("delete"), PLACES, st.integers(1, 50)),
        st.tuples(st.just("cut"), PLACES, st.none()),
        st.tuples(st.just("copy"), PLACES, PLACES),
    ),
    max_size=4,
)


def damaged(data, changes):
    """A file after changes (kind, place, how much)."""
    data = bytearray(data)
    for kind, place, value in changes:
        at = int(place * len(data))
        if not data:
            break
        if kind == "flip":
            data[at] ^= 1 << value
        elif kind == "byte":
            data[at] = value
        elif kind == "large":
            data[at : at + value] = b"\xff" * value
        elif kind == "insert":
            data[at:at] = value
        elif kind == "delete":
            del data[at : at + value]
        elif kind == "cut":
            del data[at:]
        else:
            source = int(value * len(data))
            data[at : at + 30] = data[source : source + 30]
    return bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> (bytes of a file, its tensors)."""
    folder, made = tmp_path_factory.mktemp("whole"), {}
    torch_zip(folder / "zip", VALUE)
    torch_zip(folder / "compressed", VALUE, compressed=True)
    torch_legacy(folder / "legacy", VALUE)
    safetensors(folder / "safetensors", FLAT | {"c": FLAT["c"]}, {"format": "pt"})
    np.savez(folder / "npz.npz", **FLAT)
    np.savez_compressed(folder / "npz_compressed.npz", **FLAT)
    for path in folder.iterdir():
        tensors = read(path)
        assert tensors is not None and len(tensors) >= 3
        made[path.stem] = path.read_bytes(), tensors
    return made


@pytest.mark.parametrize("kind", ["zip", "compressed", "npz", "npz_compressed"])
@EXAMPLES
@given(changes=DAMAGES)
def test_archives(kind, changes, whole, tmp_path):
    """Checksums cover names, shapes and numbers, so what is read is right or is not read."""
    data, expected = whole[kind]
    path = tmp_path / "file"
    found = read(written(path, damaged(data, changes)))
    assert found is None or equal(found, expected)
    assert changes or found is not None


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
@EXAMPLES
@given(changes=DAMAGES)
def test_without_checksums(kind, changes, whole, tmp_path):
    """These formats cannot tell a changed number or letter; anything else they can."""
    data, expected = whole[kind]
    found = read(written(tmp_path / "file", damaged(data, changes)))
    assert changes or equal(found, expected)
    if found is not None:
        assert sum(array.nbytes for array in found.values()) <= 2**26 + 8 * len(data)


def test_truncated(whole, tmp_path):
    for kind, (data, _) in whole.items():
        for stop in range(0, len(data), 23):
            path = written(tmp_path / "file", data[:stop])
            assert read(path) is None, f"{kind} of {stop} bytes"


def test_bits_of_an_archive(whole, tmp_path):
    """One bit of every fifth byte, so of every field of its records."""
    data, expected = whole["zip"]
    for at in range(0, len(data), 5):
        found = read(
            written(tmp_path / "file", damaged(data, [("flip", (at + 0.5) / len(data), at % 8)]))
        )
        assert found is None or equal(found, expected), at


@EXAMPLES
@given(changes=DAMAGES)
def test_pickles_with_the_right_checksum(changes, whole, tmp_path):
    """An archive made on purpose: the pickle is damaged, its checksum is not."""
    from weight_writers import Pickle, raw, zipped

    pickle = Pickle()
    data = b"\x80\x02" + pickle.opcodes(VALUE) + b"."
    entries = {f"a/data/{k}": raw(base) for k, base in enumerate(pickle.storages)}
    path = zipped(tmp_path / "file", {"a/data.pkl": damaged(data, changes)} | entries)
    found = read(path)
    assert changes or equal(found, whole["zip"][1])


@settings(EXAMPLES, max_examples=1000)
@given(data=st.one_of(st.binary(max_size=300), st.integers(0, 2**32).map(lambda seed: ops(seed))))
def test_any_opcodes(data):
    try:
        unpickle(data, modules=True)
    except BadPickle as error:
        assert error.cause


def ops(seed):
    """A program of opcodes, most of which fit."""
    rng = np.random.default_rng(seed)
    pieces = [
        *(b"N", b"\x88", b")", b"]", b"}", b"\x8f", b"K\x01", b"M\x01\x00", b"X\x01\x00\x00\x00a"),
        *(b"(", b"t", b"\x85", b"\x86", b"a", b"e", b"s", b"u", b"\x90", b"\x91", b"0", b"1", b"2"),
        *(b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"\x94", b"R", b"\x81", b"b", b"Q"),
        *(bytes(name("collections", "OrderedDict")), bytes(name("argparse", "Namespace"))),
        *(bytes(name("torch._utils", "_rebuild_tensor_v2")), bytes(name("torch", "FloatStorage"))),
        *(
            bytes(name("torch", "Size")),
            bytes(name("builtins", "set")),
            bytes(name("__torch__", "A")),
        ),
        *(bytes(name("_codecs", "encode")), bytes(name("numpy", "dtype"))),
    ]
    return b"\x80\x02" + b"".join(pieces[k] for k in rng.integers(len(pieces), size=40)) + b"."


def test_checksums_are_what_archives_have(whole):
    """The tests above rest on it."""
    data, _ = whole["zip"]
    assert zlib.crc32(BASE.tobytes()).to_bytes(4, "little") in data
