"""What a hostile pickle asks for is refused by name, and nothing of it happens."""

import builtins
import importlib
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from weight_writers import (
    Raw,
    call,
    instance,
    integer,
    name,
    opcodes,
    text,
    torch_legacy,
    torch_zip,
    zipped,
)

from bivl.core.errors import UserError
from bivl.weights import machine, parts
from bivl.weights.admitted import BadPickle, Record
from bivl.weights.files import open_weights
from bivl.weights.unpickle import unpickle

HOSTILE = {
    "system": call(name("os", "system"), "touch MARK"),
    "posix": call(name("posix", "system"), "touch MARK"),
    "eval": call(name("builtins", "eval"), "open('MARK', 'w')"),
    "python 2": call(name("__builtin__", "exec"), "open('MARK', 'w')"),
    "open": call(name("builtins", "open"), "MARK", "w"),
    "getattr": call(name("builtins", "getattr"), "", "format"),
    "type": call(name("builtins", "type"), "A", (), {}),
    "import": call(name("builtins", "__import__"), "antigravity"),
    "importlib": call(name("importlib", "import_module"), "antigravity"),
    "popen": call(name("subprocess", "Popen"), ["touch", "MARK"]),
    "runpy": call(name("runpy", "run_path"), "MARK"),
    "torch.load": call(name("torch", "load"), "MARK"),
    "torch.save": call(name("torch", "save"), {}, "MARK"),
    "torch.hub": call(name("torch.hub", "load"), "a/b", "c"),
    "extension": call(name("torch.utils.cpp_extension", "load"), "MARK"),
    "numpy arrays": call(name("numpy.core.multiarray", "_reconstruct"), 0, (0,), "b"),
    "numpy.load": call(name("numpy", "load"), "MARK"),
    "runstring": call(name("numpy.testing._private.utils", "runstring"), "", {}),
    "partial": call(name("functools", "partial"), "MARK"),
    "attrgetter": call(name("operator", "attrgetter"), "a"),
    "methodcaller": call(name("operator", "methodcaller"), "a"),
    "map": call(name("builtins", "map"), "a", "b"),
    "newobj": instance(name("collections", "deque"), a=1),
    "reconstructor": call(name("copy_reg", "_reconstructor"), 1, 2, 3),
    "pickle": call(name("_pickle", "loads"), "a"),
    "dotted": name("torch", "_utils._rebuild_tensor_v2.__globals__"),
    "nested": name("collections.OrderedDict", "__init__"),
    "as a module": name("__torch__.os", "system"),  # only in a TorchScript archive
    "a path": call(name("pathlib", "PosixPath"), "/"),
    "stack global": Raw(text("os") + text("system") + b"\x93"),
    "enum": call(name("fairseq.dataclass.constants", "DDP_BACKEND_CHOICES"), "no_c10d"),
    "omegaconf": instance(name("omegaconf.dictconfig", "DictConfig"), a=1),
    "device": call(name("torch", "device"), "cpu"),
}


@pytest.fixture
def alert(monkeypatch, tmp_path):
    """Fails where anything that could run something is called; gives what was imported."""
    called = []
    for module, attribute in (
        *((os, "system"), (os, "popen"), (os, "execv"), (subprocess, "Popen")),
        *((builtins, "eval"), (builtins, "exec"), (importlib, "import_module")),
        *((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler")),
    ):
        monkeypatch.setattr(module, attribute, lambda *a, at=attribute, **k: called.append(at))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield called
    assert not called and set(sys.modules) == before
    assert not (tmp_path / "MARK").exists()


def refused(path, *words):
    with pytest.raises(UserError) as error:
        open_weights(path)
    line = str(error.value)
    assert line.startswith(f"weights {path}") and line.isprintable() and "; " in line, line
    for word in words:
        assert word in line.removeprefix(f"weights {path}"), line


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
@pytest.mark.parametrize("where", ["top", "ignored", "argument", "config", "popped"])
def test_hostile(case, write, where, alert, tmp_path):
    hostile, good = HOSTILE[case], {"w": np.ones(3, np.float32)}
    value = {
        "top": hostile,
        "ignored": {"model": good, "extra_state": {"a": [hostile]}},
        "argument": {"model": good, "x": call(name("torch", "Size"), hostile)},
        "config": {"model": good, "args": instance(name("argparse", "Namespace"), a=hostile)},
        "popped": {"model": good, "x": Raw(hostile + b"0N")},
    }[where]
    refused(write(tmp_path / "a.pt", value))


def test_refused_by_name(tmp_path):
    for case, full in {
        "system": "os.system",
        "eval": "builtins.eval",
        "device": "torch.device",
    }.items():
        value = {"model": {"w": np.ones(3)}, "ignored": HOSTILE[case]}
        refused(torch_zip(tmp_path / "a.pt", value), f"holds {full}, which is no tensor")
    long = {"x": name("a" * 400, "b\x1b[31m")}
    refused(torch_zip(tmp_path / "b.pt", long), "\\x1b")


def test_torch_script_admits_no_more(tmp_path):
    archive = {"constants.pkl": b"\x80\x02)."}
    for case in HOSTILE.keys() - {"as a module"}:
        refused(torch_zip(tmp_path / "a.pt", {"w": np.ones(3), "x": HOSTILE[case]}, extra=archive))
    script = call(name("__torch__.os", "system"), "touch MARK")
    refused(torch_zip(tmp_path / "b.pt", {"x": script}, extra=archive), "calls __torch__.os.system")


def loaded(data, **options):
    return unpickle(b"\x80\x02" + data + b".", **options)[0]


@pytest.mark.parametrize("kind", ["OrderedDict", "Counter", "defaultdict"])
def test_no_dict_is_made_of_bytes(kind):
    """A compressed archive has many for little, and as numbers each takes eight times as much."""
    size = 2**22
    data = b"B" + struct.pack("<I", size) + bytes(size)
    factory = [name("builtins", "list")] if kind == "defaultdict" else []
    made = call(name("collections", kind), *factory, Raw(data))
    tracemalloc.start()
    try:
        with pytest.raises(BadPickle, match="is damaged"):
            loaded(made)
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(protocol):
    """What Python writes of plain values is what they were."""
    same = [1, "a"]
    value = {
        **{"int": [0, -1, 255, 65536, 2**31, -(2**31), 2**62, -(2**100)], "none": None, "t": True},
        **{"text": ["", "ü" * 300, "x" * 70000], "bytes": [b"", b"\xff" * 300], "f": [1.5, -0.0]},
        **{"tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 3: {"a": {}}, None: False},
        **{"sets": [set(), {1, "a"}, frozenset({2.5})], "many": list(range(2000)), 0.5: 1},
        **{"shared": [same, same], "complex": 1 + 2j},
    }
    data = pickle.dumps(value, protocol)
    made, stop = unpickle(data)
    assert made == value and stop == len(data)
    assert made["shared"][0] is made["shared"][1]


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_the_library(protocol):
    from argparse import Namespace
    from collections import Counter, OrderedDict, defaultdict

    value = [OrderedDict(a=1), Counter("aab"), defaultdict(list, a=[1]), Namespace(a=1, b=[2])]
    value += [np.float32(1.5), np.int64(-7), np.bool_(True), np.float64(2)]
    made, _ = unpickle(pickle.dumps(value, protocol))
    assert made[:3] == [{"a": 1}, {"a": 2, "b": 1}, {"a": [1]}]
    assert made[3] == Record("argparse.Namespace", {"a": 1, "b": [2]})
    assert made[4:] == [1.5, -7, True, 2.0] and [type(v) for v in made[4:]] == [
        float,
        int,
        bool,
        float,
    ]


def test_dictionary_of_fairseq():
    """The letters of a speech model come as plain data, without fairseq."""
    state = {"symbols": ["a", "b"], "__class__": "c", "__setstate__": "d"}  # names like others
    made = loaded(instance(name("fairseq.data.dictionary", "Dictionary"), **state))
    assert type(made) is Record and made == Record("fairseq.data.dictionary.Dictionary", state)


BROKEN = {
    "text beyond the end": b"X\xff\xff\xff\x7fabc",
    "text of 2**63 bytes": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "bytes of 2**64 bytes": b"\x8e" + b"\xff" * 8,
    "frame beyond the end": b"\x95" + b"\xff" * 8,
    "large integer by text": b"L" + b"9" * 10**6 + b"L\n",
    "long of four bytes": b"\x8b\xff\xff\xff\x7f",
    "no text": b"X\x02\x00\x00\x00\xff\xfe",
    "half a character": b"X\x03\x00\x00\x00\xed\xa0\x80",
    "nothing on the stack": b"a",
    "below the mark": b"](0",
    "no mark": b"t",
    "unfinished mark": b"N(",
    "two values": b"NN",
    "no value": b"",
    "unknown memo": b"h\x05",
    "odd items": b"}(Nu",
    "items of a list": b"](NNu",
    "append to a dict": b"}Na",
    "append to a tuple": b")Na",
    "a key that is a tuple": b"})Ns",
    "a key that is a list": b"}]Ns",
    "a key that is large": b"}" + integer(2**70) + b"Ns",
    "a key twice": b"}(K\x01NK\x01Nu",
    "an element that is a tuple": b"\x8f()\x90",
    "a list made of a number": call(name("builtins", "set"), 3),
    "call of a text": text("os.system") + b")R",
    "call of a class": call(name("argparse", "Namespace")),
    "call of fairseq's class": call(name("fairseq.data.dictionary", "Dictionary")),
    "object of a function": name("torch", "Size") + b")\x81",
    "object with arguments": name("argparse", "Namespace") + b"K\x01\x85\x81",
    "a text where a class should be": text("fairseq.data.dictionary.Dictionary") + b")\x81",
    "attributes twice": instance(name("argparse", "Namespace"), a=1) + b"}X\x01\x00\x00\x00bNsb",
    "attributes that are none": name("argparse", "Namespace") + b")\x81K\x01b",
    "attributes of a number": b"K\x01}b",
    "no storage": text("storage") + b"Q",
    "storage of a module": b"(" + text("module") + b"NNNNtQ",
    "storage of a list": opcodes(("storage", [], "0", "cpu", 1)) + b"Q",
    "tensor of a list": call(
        name("torch._utils", "_rebuild_tensor_v2"), [], 0, (1,), (1,), False, {}
    ),
    "tensor of nothing": call(name("torch._utils", "_rebuild_tensor_v2")),
    "parameter of a list": call(name("torch._utils", "_rebuild_parameter"), [], False, {}),
    "bytes of another code": call(name("_codecs", "encode"), "a", "rot13"),
    "complex text": call(name("builtins", "complex"), "1", "2"),
    "numpy objects": call(name("numpy", "dtype"), "O8", False, True),
    "numpy number without a type": call(name("numpy.core.multiarray", "scalar"), 1, 2),
    "inst": b"(ios\nsystem\n",
    "obj": b"(" + name("argparse", "Namespace") + b"o",
    "newobj_ex": name("argparse", "Namespace") + b")}\x92",
    "persistent text": b"Pa\n",
    "extension": b"\x82\x01",
    "extension of four bytes": b"\x84\x01\x00\x00\x00",
    "buffer": b"\x97",
    "bytearray": b"\x96" + b"\x01" + bytes(7) + b"a",
    "protocol 0": b"I1\n",
    "protocol 9": b"\x80\x09N",
    "no opcode": b"\xfe",
    "name without an end": b"cos" + b"a" * 5000,
    "name that is no ASCII": b"c\xff\nb\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case, alert):
    with pytest.raises(BadPickle) as error:
        loaded(BROKEN[case])
    assert error.value.cause and error.value.cure


@pytest.mark.parametrize(
    "data",
    [
        b"]" * 30_000,
        b"\x8f" * 30_000,
        b"]q\x00" + b"(" * 30_000,
        b"](" + b"N" * 1000 + b"eq\x00" + (name("builtins", "set") + b"h\x00\x85R0") * 50,
        text("x" * 1000) + b"q\x00" + call(name("_codecs", "encode"), Raw(b"h\x00"), "latin1") * 99,
    ],
)
def test_bounded_work(data, monkeypatch):
    monkeypatch.setattr(machine, "_MAX_STEPS", 20_000)
    with pytest.raises(BadPickle, match="more objects than a model needs"):
        loaded(data)


def nested(depth, shared):
    """[[...]], or lists that hold the one before twice: 2**depth of them when walked over."""
    if not shared:
        return Raw(b"]" * depth + b"a" * (depth - 1))
    step = b"".join(b"](h%ch%ceq%c" % (k, k, k + 1) for k in range(depth))
    return Raw(b"]q\x00" + step)


@pytest.mark.parametrize("where", ["model", "args", "other"])
@pytest.mark.parametrize("kind", ["deep", "shared", "cyclic"])
def test_bounded_walks(where, kind, tmp_path, monkeypatch):
    """Values that are deep, hold themselves, or grow without end when written out."""
    monkeypatch.setattr(parts, "_MAX_NODES", 20_000)
    values = {
        "deep": nested(50_000, shared=False),
        "shared": Raw(b"(" + nested(60, shared=True) + b"t"),
        "cyclic": Raw(b"]q\x00h\x00a"),
    }
    value = {"model": {"w": np.ones(3)}, "args": {"lr": 1}, "other": 1}
    value[where] = values[kind] if where == "other" else {**value[where], "x": values[kind]}
    refused(torch_zip(tmp_path / "a.pt", value), "nested too deeply or too often")


def test_damaged_pickles(tmp_path):
    def written(data):
        return zipped(tmp_path / "a.pt", {"a/data.pkl": data, "a/version": b"3\n"})

    refused(written(b""), "ends early")
    refused(written(b"\x80\x02}"), "ends early")
    refused(written(b"\x80\x02}.more"), "behind the end of its pickle")
    refused(written(bytes(2**26 + 1)), "more than a model needs")
    refused(zipped(tmp_path / "b.pt", {"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "2 entries")
    value = {"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"middle"}
    refused(zipped(tmp_path / "c.pt", value), "byte order")
