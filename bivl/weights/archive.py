"""The entries of a zip archive: where each lies in the file, and nothing that contradicts itself.

Format: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5. Entries are stored or deflated.
"""

import struct
from typing import Any

from bivl.weights.stored import Extent, File, shown

MAX_ENTRIES = 2**18
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_CENTRAL, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_MAX_DIRECTORY = 2**26
_FULL = 0xFFFFFFFF  # of a 32-bit number: the real one is in a zip64 field


def entries(file: File) -> dict[str, Extent]:
    """Name -> bytes of every entry, in the order of the archive's directory.

    Files whose entries all have checksum 0 were written without checksums (PyTorch can), so theirs
    is None.

    Raises:
      UserError: a file that ends early, entries that overlap, leave the file, come twice, are
        encrypted or compressed by another method than deflate.
    """
    start, size, count = _directory(file)
    if count > MAX_ENTRIES or size > _MAX_DIRECTORY:
        raise file.error(f"is an archive of {count} entries", "no model has so many: leave it")
    data, position, found = file.read(start, size), 0, {}
    with file.opened() as handle:
        for _ in range(count):
            entry, position = _entry(file, handle, data, position)
            if entry.name in found:
                raise file.error(f"has two entries called {shown(entry.name)}")
            found[entry.name] = entry
    _check_places(file, list(found.values()), start)
    if not any(entry.crc for entry in found.values() if entry.size):
        found = {name: _unchecked(entry) for name, entry in found.items()}
    return found


def _directory(file: File) -> tuple[int, int, int]:
    """Start and size of the central directory, and how many entries it has."""
    tail_start = max(0, file.size - 65_557)  # a comment has at most 65,535 bytes
    tail = file.read(tail_start, file.size - tail_start)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise file.error("ends before its directory of entries, so it is not whole")
    fields = struct.unpack_from("<4x4H2LH", tail, at)
    count, size, start, comment = fields[3], fields[4], fields[5], fields[6]
    if at + 22 + comment != len(tail) or fields[0] != fields[1] or fields[2] != count:
        raise file.error("has a damaged directory of entries")
    end = tail_start + at
    if end >= 20 and file.read(end - 20, 4) == _LOCATOR:
        place = struct.unpack("<4xLQL", file.read(end - 20, 20))[1]
        record = file.read(place, 56) if place + 56 <= end - 20 else b""
        if record[:4] != _END64:
            raise file.error("has a damaged directory of entries")
        count, size, start = struct.unpack_from("<32xQQQ", record)
        end = place
    if start + size != end:
        raise file.error("has a damaged directory of entries")
    return start, size, count


def _entry(file: File, handle: Any, data: bytes, position: int) -> tuple[Extent, int]:
    """The entry described at `position` of the central directory, and where the next one is."""
    if data[position : position + 4] != _CENTRAL or len(data) - position < 46:
        raise file.error("has a damaged directory of entries")
    fields = struct.unpack_from("<4x2H2H2H3L3H2H2L", data, position)
    flags, method, crc, stored, size = fields[2], fields[3], *fields[6:9]
    names, extras, comments, offset = *fields[9:12], fields[15]
    stop = position + 46 + names + extras + comments
    if stop > len(data):
        raise file.error("has a damaged directory of entries")
    raw = data[position + 46 : position + 46 + names]
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise file.error("has an entry whose name is no UTF-8") from None
    if flags & 0x41:
        raise file.error(f"has an encrypted entry, {shown(name)}", "decrypt it first")
    if method not in (0, 8):
        raise file.error(
            f"{shown(name)} is compressed by method {method}", "write the archive uncompressed"
        )
    extra = data[position + 46 + names : position + 46 + names + extras]
    size, stored, offset = _large(file, extra, [size, stored, offset])
    start = _data_start(file, handle, offset, raw, method)
    if method == 0 and stored != size:
        raise file.error(f"{shown(name)} has two different sizes")
    return Extent(file, name, start, stored, size, crc, method == 8), stop


def _large(file: File, extra: bytes, values: list[int]) -> list[int]:
    """`values`, those that are full replaced by the 64-bit numbers of the zip64 field, in order."""
    numbers: list[int] = []
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1 and size <= len(extra) - 4:
            numbers = list(struct.unpack_from(f"<{size // 8}Q", extra, 4))
        extra = extra[4 + size :]
    if values.count(_FULL) > len(numbers):
        raise file.error("has a damaged directory of entries")
    return [numbers.pop(0) if value == _FULL else value for value in values]


def _data_start(file: File, handle: Any, offset: int, raw: bytes, method: int) -> int:
    """Where the bytes of an entry start: behind its local header, which must be about it."""
    header = bytearray(30 + len(raw))
    if offset + len(header) > file.size:
        raise file.error("ends too early")
    file.fill(handle, offset, memoryview(header))
    local_method, names, extras = struct.unpack_from("<8xH16x2H", header)
    if header[:4] != _LOCAL or header[30:] != raw or names != len(raw) or local_method != method:
        raise file.error("has a damaged entry: its two descriptions differ")
    return offset + 30 + names + extras


def _check_places(file: File, found: list[Extent], stop: int) -> None:
    end = 0
    for entry in sorted(found, key=lambda entry: (entry.start, entry.stored)):
        if entry.start < end or entry.start + entry.stored > stop:
            raise file.error(f"{shown(entry.name)} overlaps with what is not its own")
        end = entry.start + entry.stored


def _unchecked(entry: Extent) -> Extent:
    return Extent(
        entry.file, entry.name, entry.start, entry.stored, entry.size, None, entry.deflated
    )
