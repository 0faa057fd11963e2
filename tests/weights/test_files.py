import json
import os

import ml_dtypes
import numpy as np
import pytest
from weight_writers import (
    Strided,
    call,
    headed,
    instance,
    name,
    safetensors,
    torch_legacy,
    torch_zip,
    written,
    zipped,
)

from bivl.core.errors import UserError
from bivl.weights import stored
from bivl.weights.files import open_weights

NAMESPACE = name("argparse", "Namespace")
DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"),
    *("bfloat16", "complex64", "complex128"),
)


def numbers(dtype="float32", shape=(3, 4)):
    """Numbers that differ, some negative where the type has those."""
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape) - (dtype[0] not in "ub") * 5
    return values.astype(getattr(ml_dtypes, dtype, None) or dtype)


def same(weights, expected):
    """Whether all tensors, read, are the arrays expected, in number, name, type and value."""
    assert list(weights.tensors) == list(expected)
    for key, array in expected.items():
        tensor = weights.tensors[key]
        read = tensor.read()
        assert tensor.shape == read.shape == array.shape
        assert tensor.dtype == read.dtype == array.dtype
        assert read.flags.writeable and read.dtype.isnative
        np.testing.assert_array_equal(read, array)


def refused(path, *words, **options):
    """The one line that opening `path` and reading all of it ends with."""
    with pytest.raises(UserError) as error:
        for tensor in open_weights(path, **options).tensors.values():
            tensor.read()
    line = str(error.value)
    assert line.startswith(f"weights {path}") and line.isprintable() and "; " in line, line
    for word in words:
        assert word in line.removeprefix(f"weights {path}"), line
    return line


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_types(write, tmp_path):
    arrays = {dtype: numbers(dtype) for dtype in DTYPES}
    weights = open_weights(write(tmp_path / "any.name", arrays))
    assert weights.kind == "torch" and weights.files == ("any.name",)
    same(weights, arrays)


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_views(write, tmp_path):
    base, one = numbers(shape=(24,)), np.float32([7])
    views = {
        "whole": Strided(base, (4, 6), (6, 1)),
        "transposed": Strided(base, (6, 4), (1, 6)),
        "column": Strided(base, (4,), (6,), 5),
        "every other": Strided(base, (2, 3), (12, 2), 1),
        "expanded": Strided(one, (1000, 3), (0, 0)),
        "twice": Strided(base, (2, 2), (3, 0)),  # as many bytes as it spans, but none once
        "scalar": Strided(base, (), (), 23),
        "empty": Strided(base, (0, 5), (5, 1), 24),
    }
    rows = base.reshape(4, 6)
    expected = {
        "whole": rows,
        "transposed": rows.T,
        "column": rows[:, 5],
        "every other": base.reshape(2, 12)[:, 1:7:2],
        "expanded": np.full((1000, 3), 7, np.float32),
        "twice": np.float32([[-5, -5], [-2, -2]]),
        "scalar": base[23],
        "empty": np.empty((0, 5), np.float32),
    }
    weights = open_weights(write(tmp_path / "views", views))
    same(weights, expected)
    for tensor in weights.tensors.values():
        first, again = tensor.read(), tensor.read()
        marks = np.arange(100, 100 + first.size, dtype=first.dtype).reshape(first.shape)
        first[...] = marks  # what was read is the caller's, and no two elements are one
        np.testing.assert_array_equal(first, marks)
        assert not np.any(again >= 100)


def test_no_elements(tmp_path):
    arrays = {"none": np.empty((0,), np.float32), "zero": np.float32(3), "b": np.bool_([True])}
    same(open_weights(torch_zip(tmp_path / "a.pt", arrays)), arrays)
    same(open_weights(torch_zip(tmp_path / "b.pt", arrays, compressed=True)), arrays)


def test_big_endian(tmp_path):
    arrays = {dtype: numbers(dtype) for dtype in DTYPES}
    same(open_weights(torch_zip(tmp_path / "a.pt", arrays, order="big")), arrays)


def test_bytes_of_one(tmp_path):
    """1.0 of types whose bytes NumPy leaves to others, in both orders, as the formats have them."""
    for order, data in (("big", b"\x3f\x80"), ("little", b"\x80\x3f")):
        value = {"w": np.zeros(1, ml_dtypes.bfloat16)}
        path = torch_zip(tmp_path / "a.pt", value, order=order, extra={"data/0": data})
        assert open_weights(path).tensors["w"].read().tolist() == [1]
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [1, 2]},
    }
    weights = open_weights(headed(tmp_path / "b", json.dumps(header).encode(), b"\x38\x3c"))
    kinds = {"a": ml_dtypes.float8_e4m3fn, "b": ml_dtypes.float8_e5m2}
    same(weights, {key: np.ones(1, kind) for key, kind in kinds.items()})


def test_truth_is_zero_or_one(tmp_path):
    """A byte other than 0 and 1 in a bool tensor is true, and no third value."""
    path = torch_zip(tmp_path / "a.pt", {"b": np.bool_([1, 0])}, extra={"data/0": b"\x07\x00"})
    assert open_weights(path).tensors["b"].read().view(np.uint8).tolist() == [1, 0]


def test_compressed(tmp_path):
    base = numbers(shape=(300, 400))
    value = {"a": base, "row": Strided(base, (400,), (1,), 800)}
    same(
        open_weights(torch_zip(tmp_path / "a.pt", value, compressed=True)),
        {"a": base, "row": base[2]},
    )


def test_parts(tmp_path):
    plain = {"a.weight": numbers(), "_ema": {"a.weight": numbers(shape=(2,))}, "version": 3}
    value = {
        "model_ema": {"a.weight": numbers(shape=(1,))},
        "model": plain,
        "optimizer": {"state": {0: {"exp_avg": numbers()}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 7,
        "args": instance(NAMESPACE, lr=0.5, sizes=(1, 2), nested={"a": [None, True]}),
        "cfg": None,
    }
    path = torch_zip(tmp_path / "a.pt", value)
    weights = open_weights(path)
    assert weights.part == "model"
    same(weights, {"a.weight": plain["a.weight"], "_ema.a.weight": plain["_ema"]["a.weight"]})
    assert weights.config == {"lr": 0.5, "sizes": (1, 2), "nested": {"a": [None, True]}}
    assert {key: list(part) for key, part in weights.parts.items()} == {
        "model_ema": ["a.weight"],
        "model": ["a.weight", "_ema.a.weight"],
        "optimizer": ["state.0.exp_avg"],
    }
    assert weights.left == {
        "model_ema": "1 tensors",
        "optimizer": "1 tensors",
        "model.version": "int 3",
        "optimizer.param_groups.0.lr": "float 0.1",
        "epoch": "int 7",
        "cfg": "NoneType",
    }
    same(open_weights(path, part="model_ema"), {"a.weight": numbers(shape=(1,))})
    refused(path, "no part teacher", "model_ema, model, optimizer", part="teacher")


@pytest.mark.parametrize(
    "value, part, names",
    [
        ({"w": np.zeros(1)}, "", ["w"]),
        ({"w": np.zeros(1), "args": {"lr": 1}}, "", ["w"]),
        ({"w": np.zeros(1), "args": np.zeros(1)}, "", ["w", "args"]),
        ({"module": {"w": np.zeros(1)}, "model": {}}, "module", ["w"]),
        ({"state_dict": {"w": np.zeros(1)}, "best": np.zeros(())}, "state_dict", ["w"]),
        ({"weights": {"w": np.zeros(1)}, "step": 3}, "weights", ["w"]),
        ({"model": {"l": [np.zeros(1), np.zeros(2)]}}, "model", ["l.0", "l.1"]),
    ],
)
def test_part_by_rule(value, part, names, tmp_path):
    weights = open_weights(torch_zip(tmp_path / "a.pt", value))
    assert (weights.part, list(weights.tensors)) == (part, names)


@pytest.mark.parametrize(
    "value, word",
    [
        ({"a": {"w": np.zeros(1)}, "b": {"w": np.zeros(1)}}, "name one of its parts: a, b"),
        ({"optimizer": {"w": np.zeros(1)}}, "name one of its parts: optimizer"),
        ({"model": {"w": 1}}, "holds no tensors"),
        ([np.zeros(1)], "list of 1"),
        (np.zeros(1), "single tensor"),
        ({"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)}, "two values called a.b"),
        ({"a\n": np.zeros(1)}, "no name"),
        ({"": np.zeros(1)}, "no name"),
        ({"x" * 1001: np.zeros(1)}, "too long"),
    ],
)
def test_no_part(value, word, tmp_path):
    refused(torch_zip(tmp_path / "a.pt", value), word)


def test_ordered_dict_with_metadata(tmp_path):
    """State dicts of PyTorch: attributes of the dict itself are no tensors."""
    made = call(name("collections", "OrderedDict"))
    pairs = b"(X\x01\x00\x00\x00wK\x01u"
    attributes = b"}X\x09\x00\x00\x00_metadata}sb"
    value = {"model": type(made)(made + pairs + attributes), "w": np.zeros(2)}
    assert open_weights(torch_zip(tmp_path / "a.pt", value)).left == {"model.w": "int 1"}


def test_torchscript(tmp_path):
    """Modules are records of a class that the archive defines; their attributes are the names."""
    inner = instance(name("__torch__.torch.nn.___torch_mangle_3", "Linear"), training=True)
    value = instance(name("__torch__.model", "Net"), visual=inner, training=False)
    path = torch_zip(tmp_path / "a.pt", value, extra={"constants.pkl": b"\x80\x02)."})
    refused(path, "holds no tensors")
    state = {"w": numbers(), "sizes": call(name("torch.jit._pickle", "build_intlist"), [1])}
    archive = {"constants.pkl": b"\x80\x02)."}
    # a dict of modules, so that the writer sees the arrays
    path = torch_zip(tmp_path / "b.pt", {"visual": state}, extra=archive)
    weights = open_weights(path)
    assert weights.kind == "torchscript" and weights.left == {}
    same(weights, {"visual.w": numbers()})
    refused(torch_zip(tmp_path / "c.pt", value), "__torch__.model.Net")


def test_shared_storage_is_checked_once(tmp_path, monkeypatch):
    base = numbers(shape=(2000,))
    views = {str(k): Strided(base, (1,), (1,), k) for k in range(2000)}
    weights = open_weights(torch_zip(tmp_path / "a.pt", views))
    calls, crc32 = [], stored.zlib.crc32
    monkeypatch.setattr(stored.zlib, "crc32", lambda *args: calls.append(1) or crc32(*args))
    assert [tensor.read()[0] for tensor in weights.tensors.values()] == base.tolist()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "shape, strides, offset",
    [
        ((25,), (1,), 0),
        ((4, 6), (7, 1), 0),
        ((1,), (1,), 24),
        ((2**40,), (1,), 0),
        ((2**61, 2**61), (0, 0), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 1),
        ((2,), (1,), -1),
        ((2, 2), (1,), 0),
        ((True,), (1,), 0),
        ((1,) * 33, (1,) * 33, 0),
        ((2**70,), (0,), 0),
        ((2**31, 2**20), (0, 0), 0),  # more than the file by far
    ],
)
def test_shapes_that_do_not_fit(shape, strides, offset, tmp_path):
    value = {"w": Strided(numbers(shape=(24,)), shape, strides, offset)}
    with pytest.raises(UserError):  # already when it is opened
        open_weights(torch_zip(tmp_path / "a.pt", value))
    with pytest.raises(UserError):  # in parts that are not used too
        value = {"model": {"v": np.ones(1)}, "optimizer": value}
        open_weights(torch_zip(tmp_path / "b.pt", value))


def test_much_out_of_little(tmp_path):
    """Many thin slices of one storage, and a compressed one read again and again."""
    base = np.zeros(2**22, np.uint8)
    thin = {str(k): Strided(base, (2,), (2**22 - 1,)) for k in range(100)}
    refused(torch_zip(tmp_path / "a.pt", thin), "far more")
    small = {str(k): Strided(base, (1,), (1,)) for k in range(100)}
    same(open_weights(torch_zip(tmp_path / "b.pt", small)), dict.fromkeys(small, base[:1]))
    refused(torch_zip(tmp_path / "c.pt", small, compressed=True), "far more")


def test_storages_of_another_size(tmp_path):
    for data in (b"", bytes(11), bytes(13)):
        path = torch_zip(tmp_path / "a.pt", {"w": np.zeros(3, "f4")}, extra={"data/0": data})
        refused(path, "storage of w")


def test_bomb(tmp_path, monkeypatch):
    """An entry that grows when decompressed gives no more than it said, and says so at once."""
    path = torch_zip(tmp_path / "a.pt", {"w": np.zeros(2**22, np.uint8)}, compressed=True)
    data = path.read_bytes()
    size, less = (2**22).to_bytes(4, "little"), (2**10).to_bytes(4, "little")
    assert data.count(size) >= 2
    tensors = {"w": np.zeros(2**10, np.uint8)}
    small = torch_zip(tmp_path / "b.pt", tensors, compressed=True, extra={"data/0": bytes(2**22)})
    written(small, small.read_bytes().replace(size, less))
    refused(small, "longer than it says")


def test_npz(tmp_path):
    arrays = {k: numbers(k) for k in DTYPES if k != "bfloat16"}
    arrays |= {"f": np.asfortranarray(numbers()), "big": numbers().astype(">f4"), "s": np.array(1)}
    native = {k: v.astype(v.dtype.newbyteorder("=")) for k, v in arrays.items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        weights = open_weights(tmp_path / "a.npz")
        assert weights.kind == "npz"
        same(weights, native)
    np.savez(tmp_path / "o.npz", o=np.array([{}, print], object), allow_pickle=True)
    refused(tmp_path / "o.npz", "objects are never read")
    np.savez(tmp_path / "b.npz", b=np.zeros(2, ml_dtypes.bfloat16))
    refused(tmp_path / "b.npz", "bfloat16")
    for bad in (b"", b"\x93NUMPY\x01\x00\xff\xff", b"\x93NUMPY\x01\x00\x02\x00{}"):
        refused(zipped(tmp_path / "c.npz", {"w.npy": bad}), "w")


def test_safetensors(tmp_path):
    arrays = {k: numbers(k) for k in ("float32", "float16", "bfloat16", "int64", "bool")}
    arrays |= {"empty": np.empty((0, 3), np.float32), "scalar": np.float32(2)}
    arrays = {k: np.asarray(v) for k, v in arrays.items()}
    weights = open_weights(safetensors(tmp_path / "a", arrays, {"format": "pt"}))
    assert weights.kind == "safetensors" and weights.config == {"format": "pt"}
    same(weights, arrays)


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, size",
    [
        ({"w": W}, 7),
        ({"w": W}, 9),
        ({"w": W | {"shape": [3]}}, 8),
        ({"w": W | {"shape": [-2]}}, 8),
        ({"w": W | {"shape": [2.0]}}, 8),
        ({"w": W | {"shape": [True, 2]}}, 8),
        ({"w": W | {"shape": [1] * 40 + [2]}}, 8),
        ({"w": W | {"shape": [2**62, 0]}}, 8),
        ({"w": W | {"dtype": "F33"}}, 8),
        ({"w": W | {"dtype": ["F32"]}}, 8),
        ({"w": W | {"data_offsets": [0, 8, 9]}}, 8),
        ({"w": W | {"data_offsets": [8, 0]}}, 8),
        ({"w": W | {"more": 1}}, 8),
        ({"w": W, "v": W}, 8),
        ({"w": W, "v": W}, 16),
        ({"w": W, "v": W | {"data_offsets": [4, 12]}}, 12),
        ({"w": W, "v": W | {"data_offsets": [12, 20]}}, 20),
        ({"w": None}, 0),
        ({"__metadata__": {"a": 1}, "w": W}, 8),
        ({"__metadata__": []}, 0),
        ({}, 0),
    ],
)
def test_safetensors_refused(header, size, tmp_path):
    refused(headed(tmp_path / "a", json.dumps(header).encode(), bytes(size)))


@pytest.mark.parametrize(
    "header",
    [
        b'{"w": 1, "w": 2}',
        b'{"w": NaN}',
        b"{" + b'"a":{' * 100_000,
        b'{"w": ' + b"9" * 5000 + b"}",
        b'{"w": [' + b"[]," * 3_000_000 + b"[]]}",
        b'{"\\ud800": 1}',
        b'{"\xff": 1}',
        b"{",
    ],
)
def test_headers_refused(header, tmp_path):
    refused(headed(tmp_path / "a", header))


def test_header_longer_than_the_file(tmp_path):
    for size in (100, 100_000_000, 2**63):
        refused(written(tmp_path / "a", size.to_bytes(8, "little") + b"{}"))


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x80\x04]\x94.", "pickle that torch.save did not write"),
        (b"PK\x03\x04", "ends before its directory"),
        (b"PK\x05\x06" + bytes(18), "without weights"),
        (bytes(257) + b"ustar", "older than PyTorch"),
        (b"hello", "no PyTorch, safetensors or npz file"),
    ],
)
def test_other_files(data, word, tmp_path):
    refused(written(tmp_path / "a.pt", data), word)


def test_no_file(tmp_path):
    refused(tmp_path / "none.pt", "No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
    with pytest.raises(UserError, match="valid path"):
        open_weights("a\0b")


def test_a_file_that_changes(tmp_path):
    path = torch_zip(tmp_path / "a.pt", {"w": np.zeros(3)})
    tensor = open_weights(path).tensors["w"]
    torch_zip(path, {"w": np.ones(30)})
    with pytest.raises(UserError, match="has changed"):
        tensor.read()
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        tensor.read()


def test_damaged_numbers(tmp_path):
    """A bit of the numbers themselves: the archive's checksum tells, of views of a part too."""
    base = np.full(100, 1.5, np.float32)
    path = torch_zip(tmp_path / "a.pt", {"w": base, "part": Strided(base, (3,), (1,), 90)})
    data = bytearray(path.read_bytes())
    data[data.index(base.tobytes())] ^= 1
    weights = open_weights(written(path, data))
    for tensor in weights.tensors.values():
        with pytest.raises(UserError, match="checksum"):
            tensor.read()


def test_archive_without_checksums(tmp_path):
    """PyTorch can leave them out, and writes 0 for each."""
    path = torch_zip(tmp_path / "a.pt", {"w": numbers()})
    data = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x01\x02", 16), (b"PK\x03\x04", 14)):
        start = data.find(magic)
        while start >= 0:
            data[start + at : start + at + 4] = bytes(4)
            start = data.find(magic, start + 1)
    same(open_weights(written(path, data)), {"w": numbers()})


def test_large_archives(tmp_path, monkeypatch):
    """Beyond 4 GiB sizes and places are 64-bit numbers elsewhere; here that starts at 10 bytes."""
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", 10)
    path = torch_zip(tmp_path / "a.pt", {"v": numbers(), "w": numbers("int8")})
    data = path.read_bytes()
    assert b"PK\x06\x06" in data and b"PK\x06\x07" in data
    same(open_weights(path), {"v": numbers(), "w": numbers("int8")})
    for at in (data.index(b"PK\x06\x06"), data.index(b"PK\x06\x07") + 8):
        refused(written(path, data[:at] + b"\xff" + data[at + 1 :]), "damaged directory")


def test_two_entries_of_one_name(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zipped_twice(tmp_path / "a.pt")
    refused(path, "two entries called a/data.pkl")


def zipped_twice(path):
    import zipfile

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        file.writestr("a/data.pkl", b"\x80\x02}.")
    return path


def test_entries_that_contradict_themselves(tmp_path):
    """Overlaps are how small archives become large; two descriptions, how readers are split."""
    path = torch_zip(tmp_path / "a.pt", {"v": np.ones(4), "w": np.zeros(4)})
    data = path.read_bytes()
    central = data.index(b"PK\x01\x02")
    first = data.index(b"archive/data/0", central) - 46
    second = data.index(b"archive/data/1", central) - 46
    local = data.index(b"archive/data/1")
    for at, new, word in (
        (second, data[first : first + 46 + 14], "two entries called"),
        (second + 42, data[first + 42 : first + 46], "two descriptions differ"),
        (local, b"archive/data/0", "two descriptions differ"),
        (local - 30 + 8, b"\x08\x00", "two descriptions differ"),
        (second + 20, b"\xff\xff", "two different sizes"),
        (second + 42, b"\xff\xff\xff\x7f", "ends too early"),
        (second + 8, b"\x01", "encrypted"),
        (second + 10, b"\x0c", "method 12"),
        (second + 46, b"\xff", "no UTF-8"),
    ):
        changed = data[:at] + new + data[at + len(new) :]
        refused(written(path, changed), word)
    sizes = (local - 30 - data.index(b"archive/data/0") + 32).to_bytes(4, "little") * 2
    longer = data[: first + 20] + sizes + data[first + 28 :]
    refused(written(path, longer), "overlaps")
    refused(written(path, data + b"more"), "damaged directory")


def test_bytes_behind_the_last_storage(tmp_path):
    path = torch_legacy(tmp_path / "a.pt", {"w": np.ones(3)})
    refused(written(path, path.read_bytes() + bytes(3)), "3 bytes behind its last storage")
