"""PyTorch's files without PyTorch: what `torch.save` and `torch.jit.save` write.

Formats: a zip archive with NAME/data.pkl and the storages in NAME/data/KEY (since PyTorch 1.6), and
before that pickles and storages in a row in one file; as in PyTorch's `torch/serialization.py`.
"""

import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.weights import unpickle
from bivl.weights.admitted import BYTES, KINDS, BadPickle, Storage, View
from bivl.weights.stored import Extent, File, shown
from bivl.weights.tensors import Tensor, placed

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9", re.DOTALL)
_PICKLE = re.compile(r"([^/]+)/data\.pkl")
_TRUSTED = "if you trust it, save it again with PyTorch: torch.save(torch.load(FILE), NEW)"


class Opened:
    """The value in a PyTorch file and the bytes of its storages.

    value: what `unpickle` gave.
    script: whether it is a TorchScript archive, so that modules are records and names attributes.
    """

    def __init__(
        self, file: File, value: Any, extents: Mapping[str, Extent], order: str, script: bool
    ) -> None:
        self.file, self.value, self.extents = file, value, extents
        self.order, self.script = order, script

    def tensor(self, name: str, view: View) -> Tensor:
        """The tensor of a view. UserError if it does not lie within its storage."""
        storage = view.storage
        extent = self.extents.get(storage.key)
        kind, dtype = _dtype(self.file, storage), None
        if extent is None or storage.elements * kind.itemsize != extent.size:
            raise self.file.error(f"the storage of {shown(name)} is missing or of another size")
        dtype = KINDS.get(view.kind) if view.kind else kind
        if dtype is None or (storage.kind == BYTES and not view.kind):
            raise self.file.error(f"{shown(name)} has the unknown type {shown(view.kind)}")
        strides = tuple(step * dtype.itemsize for step in view.strides)
        offset = view.offset * dtype.itemsize
        return placed(name, Tensor(view.shape, dtype, extent, offset, strides, self.order))


def open_zip(file: File, entries: Mapping[str, Extent]) -> Opened:
    """A file of PyTorch 1.6 or newer, whose archive has `entries`."""
    pickles = [match for match in map(_PICKLE.fullmatch, entries) if match]
    if len(pickles) != 1:
        raise file.error(f"has {len(pickles)} entries called data.pkl, not one")
    root = pickles[0][1]
    script = f"{root}/constants.pkl" in entries
    data = _small(entries[f"{root}/data.pkl"], unpickle.MAX_BYTES)
    order = {b"little": "<", b"big": ">"}.get(_small(entries.get(f"{root}/byteorder"), 16))
    if order is None:
        raise file.error("says no byte order that exists")
    value, stop = _unpickled(file, data, 0, script)
    if stop != len(data):
        raise file.error(f"has {len(data) - stop} bytes behind the end of its pickle")
    prefix = f"{root}/data/"
    extents = {n.removeprefix(prefix): e for n, e in entries.items() if n.startswith(prefix)}
    return Opened(file, value, extents, order, script)


def _small(entry: Extent | None, limit: int) -> bytes:
    if entry is None:
        return b"little"  # what was written before there was a choice
    if entry.size > limit:
        raise entry.error(f"has {entry.size} bytes, more than a model needs", _TRUSTED)
    return entry.read().tobytes()


def open_legacy(file: File) -> Opened:
    """A file older than PyTorch 1.6, or written as such."""
    data = file.read(0, min(file.size, unpickle.MAX_BYTES))
    magic, position = _unpickled(file, data, 0)
    version, position = _unpickled(file, data, position)
    system, position = _unpickled(file, data, position)
    if magic != _LEGACY_MAGIC or version != 1001 or type(system) is not dict:
        raise file.error("is of an unknown format", _TRUSTED)
    order = "<" if system.get("little_endian", True) is True else ">"
    found: list[Storage] = []
    value, position = _unpickled(file, data, position, found=found)
    keys, position = _unpickled(file, data, position)
    storages = {storage.key: storage for storage in found}
    if type(keys) is not list or not all(type(k) is str for k in keys):
        raise file.error("has a damaged list of storages")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise file.error("has a damaged list of storages")
    extents = {}
    with file.opened() as handle:
        for name in keys:
            header = bytearray(8)
            file.fill(handle, position, memoryview(header))
            (elements,) = struct.unpack(f"{order}q", header)
            size = elements * _dtype(file, storages[name]).itemsize
            if elements < 0 or position + 8 + size > file.size:
                raise file.error("ends too early")
            extents[name] = Extent(file, f"storage {name}", position + 8, size, size)
            position += 8 + size
    if position != file.size:
        raise file.error(f"has {file.size - position} bytes behind its last storage")
    return Opened(file, value, extents, order, False)


def _unpickled(
    file: File,
    data: bytes,
    position: int,
    script: bool = False,
    found: list[Storage] | None = None,
) -> tuple[Any, int]:
    try:
        return unpickle.unpickle(data, position, script, found)
    except BadPickle as error:
        raise file.error(error.cause, error.cure) from None


def _dtype(file: File, storage: Storage) -> np.dtype:
    if storage.kind == BYTES:
        return np.dtype(np.uint8)
    if storage.kind not in KINDS or not storage.kind.endswith("Storage"):
        raise file.error(f"has storages of the unknown type {shown(storage.kind)}")
    return KINDS[storage.kind]


def refuse_tar(file: File) -> UserError:
    """What to raise for a file of PyTorch 0.1.9 or older."""
    return file.error("is older than PyTorch 0.1.10", _TRUSTED)
