"""Writes weight files byte by byte from their formats' descriptions, without PyTorch."""

import json
import pathlib
import struct
import zipfile

import numpy as np

STORAGES = {
    **{"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16"},
    **{"bool": "Bool", "uint8": "Byte", "int8": "Char", "int16": "Short", "int32": "Int"},
    **{"int64": "Long", "complex64": "ComplexFloat", "complex128": "ComplexDouble"},
}


class Raw(bytes):
    """Opcodes that stand for a value."""


class Strided:
    """A view of an array in memory: shape, strides and offset in elements, as PyTorch has them."""

    def __init__(self, base, shape, strides, offset=0):
        self.base, self.shape, self.strides, self.offset = base, shape, strides, offset


def name(module, attribute):
    """GLOBAL."""
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(function, *args):
    """REDUCE."""
    return Raw(function + opcodes(tuple(args)) + b"R")


def instance(cls, **state):
    """NEWOBJ and BUILD."""
    return Raw(cls + b")\x81" + opcodes(state) + b"b")


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


class Pickle:
    """Opcodes of a value, and the storages of the arrays in it in the order they were met."""

    def __init__(self, legacy=False):
        self.legacy, self.storages = legacy, []

    def opcodes(self, value):
        if isinstance(value, Raw):
            return bytes(value)
        if isinstance(value, (np.ndarray, np.generic)):
            value = np.asarray(value)
            steps = tuple(step // value.itemsize for step in value.strides)
            value = Strided(value, value.shape, steps)
        if isinstance(value, Strided):
            return self.tensor(value)
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return integer(value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return text(value)
        if isinstance(value, (list, tuple)):
            items = b"".join(map(self.opcodes, value))
            return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"
        pairs = b"".join(self.opcodes(part) for pair in value.items() for part in pair)
        return b"}(" + pairs + b"u"

    def tensor(self, view):
        known = [k for k, base in enumerate(self.storages) if base is view.base]
        key = known[0] if known else len(self.storages)
        self.storages += [] if known else [view.base]
        kind = name("torch", f"{STORAGES[view.base.dtype.name]}Storage")
        place = ("storage", kind, str(key), "cpu", view.base.size, *([None] * self.legacy))
        storage = Raw(self.opcodes(place) + b"Q")
        rebuild = name("torch._utils", "_rebuild_tensor_v2")
        hooks = Raw(name("collections", "OrderedDict") + b")R")
        args = (storage, view.offset, tuple(view.shape), tuple(view.strides), False, hooks)
        return bytes(rebuild) + self.opcodes(args) + b"R"


def opcodes(value):
    return Pickle().opcodes(value)


def torch_zip(path, value, order="little", extra=None, compressed=False, root="archive"):
    """What `torch.save` writes since 1.6. `value` holds dicts, lists, numbers, texts and arrays."""
    pickle = Pickle()
    data = b"\x80\x02" + pickle.opcodes(value) + b"."
    entries = {"data.pkl": data, "byteorder": order.encode(), **(extra or {})}
    for key, base in enumerate(pickle.storages):
        entries.setdefault(f"data/{key}", raw(base, ">" if order == "big" else "<"))
    entries["version"] = b"3\n"
    return zipped(path, {f"{root}/{k}": v for k, v in entries.items()}, compressed)


def zipped(path, entries, compressed=False):
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as file:
        for entry, data in entries.items():
            file.writestr(entry, data)
    return pathlib.Path(path)


def raw(base, order="<"):
    """The numbers of an array in memory order."""
    flat = base.reshape(-1, order="A") if base.ndim else base
    return flat.astype(base.dtype.newbyteorder(order)).tobytes()


def torch_legacy(path, value):
    """What `torch.save` wrote before 1.6."""
    pickle = Pickle(legacy=True)
    main = pickle.opcodes(value)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    keys = [str(k) for k in range(len(pickle.storages))]
    head = [integer(0x1950A86A20F9469CFC6C), integer(1001), opcodes(system), main, opcodes(keys)]
    data = b"".join(b"\x80\x02" + part + b"." for part in head)
    for base in pickle.storages:
        data += struct.pack("<q", base.size) + raw(base)
    return written(path, data)


def safetensors(path, arrays, metadata=None, **changes):
    """A safetensors file; `changes` replace parts of the header."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}
    header, data = {}, b""
    for key, array in arrays.items():
        stop = len(data) + array.nbytes
        info = {"dtype": names[array.dtype.name], "shape": list(array.shape)}
        header[key] = info | {"data_offsets": [len(data), stop]}
        data += array.tobytes()
    if metadata is not None:
        header["__metadata__"] = metadata
    return headed(path, json.dumps(header | changes).encode(), data)


def headed(path, header, data=b""):
    """A safetensors file with a header as it is."""
    return written(path, struct.pack("<Q", len(header)) + header + data)


def written(path, data):
    pathlib.Path(path).write_bytes(data)
    return pathlib.Path(path)
