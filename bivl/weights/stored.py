"""Bytes of a file, read when asked for and never past their end.

Files are read, not memory-mapped: a file that shrinks meanwhile is an error then, not a crash, and
what was read before does not stay in memory.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from bivl.core.errors import UserError

AGAIN = "get the file again"
_CHUNK = 2**20


def shown(name: Any) -> str:
    """A name out of a file for a message: one line, printable, not long."""
    text = str(name) if isinstance(name, (str, int, pathlib.Path)) else type(name).__name__
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


@dataclasses.dataclass(frozen=True)
class File:
    """A regular file as it was when opened.

    stamp: what tells it from another one under the same name.
    checked: where extents start whose checksum was right.
    """

    path: pathlib.Path
    size: int
    stamp: tuple[int, ...]
    checked: set[int] = dataclasses.field(default_factory=set, compare=False, repr=False)

    @classmethod
    def at(cls, path: pathlib.Path) -> "File":
        """The file at `path`. UserError if there is none, or no regular one."""
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no valid path"
            raise UserError(f"weights {shown(path)}: {reason}; correct the path") from None
        file = cls(path, status.st_size, _stamp(status))
        if not stat.S_ISREG(status.st_mode):
            raise file.error("is no regular file", "correct the path")
        return file

    def error(self, cause: str, cure: str = AGAIN) -> UserError:
        """What to raise about this file."""
        return UserError(f"weights {shown(self.path)}: {cause}; {cure}")

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file for reading, if it still is the same."""
        try:
            with open(self.path, "rb", buffering=0) as handle:
                if _stamp(os.fstat(handle.fileno())) != self.stamp:
                    raise self.error("has changed since it was opened", "run again")
                yield handle
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror})", "correct that") from None

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on, all of them."""
        buffer = bytearray(self._inside(start, count))
        with self.opened() as handle:
            self.fill(handle, start, memoryview(buffer))
        return bytes(buffer)

    def fill(self, handle: Any, start: int, buffer: memoryview) -> None:
        """Reads bytes from `start` on into all of `buffer`."""
        handle.seek(start)
        done = 0
        while done < len(buffer):
            # Linux reads at most 2 GiB at a time.
            count = handle.readinto(buffer[done : done + 2**30])
            if not count:
                raise self.error("ends too early")
            done += count

    def _inside(self, start: int, count: int) -> int:
        if start < 0 or count < 0 or start + count > self.size:
            raise self.error("ends too early")
        return count


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Extent:
    """Bytes that belong together: an entry of an archive, or a range of a file.

    start, stored: where in the file, and how many bytes there.
    size: how many they are, more than `stored` where they are `deflated`.
    crc: their CRC-32, where the format has one. It is checked before any byte is given away.
    """

    file: File
    name: str
    start: int
    stored: int
    size: int
    crc: int | None = None
    deflated: bool = False

    def error(self, cause: str, cure: str = AGAIN) -> UserError:
        """What to raise about these bytes."""
        return self.file.error(f"{shown(self.name)} {cause}", cure)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes start..stop as a new uint8 array."""
        stop = self.size if stop is None else stop
        if not 0 <= start <= stop <= self.size:
            raise self.error("ends too early")
        unchecked = self.crc is not None and self.start not in self.file.checked
        with self.file.opened() as handle:
            if self.deflated or (unchecked and (start, stop) != (0, self.size)):
                return self._streamed(handle, start, stop)
            out = np.empty(stop - start, np.uint8)
            self.file.fill(handle, self.start + start, memoryview(out))
            if unchecked:
                self._compare(zlib.crc32(out))
            return out

    def peek(self, count: int) -> bytes:
        """The first bytes, at most `count`. Their checksum is not looked at."""
        with self.file.opened() as handle:
            found = b""
            for chunk in self._inflated(handle) if self.deflated else self._chunks(handle):
                found += chunk
                if len(found) >= count:
                    break
        return found[:count]

    def _streamed(self, handle: Any, start: int, stop: int) -> np.ndarray:
        """The same by a pass over everything, of which only a chunk at a time is in memory."""
        out, position, crc = np.empty(stop - start, np.uint8), 0, 0
        for chunk in self._inflated(handle) if self.deflated else self._chunks(handle):
            if position + len(chunk) > self.size:
                raise self.error("is longer than it says")
            crc = zlib.crc32(chunk, crc)
            first, last = max(start, position), min(stop, position + len(chunk))
            if first < last:
                piece = np.frombuffer(chunk, np.uint8)[first - position : last - position]
                out[first - start : last - start] = piece
            position += len(chunk)
        if position != self.size:
            raise self.error("is shorter than it says")
        if self.crc is not None:
            self._compare(crc)
        return out

    def _chunks(self, handle: Any) -> Iterator[bytearray]:
        for offset in range(0, self.stored, _CHUNK):
            buffer = bytearray(min(_CHUNK, self.stored - offset))
            self.file.fill(handle, self.start + offset, memoryview(buffer))
            yield buffer

    def _inflated(self, handle: Any) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-15)
        try:
            for chunk in self._chunks(handle):
                while chunk and not inflate.eof:
                    yield inflate.decompress(chunk, _CHUNK)  # at most so much, bomb or not
                    chunk = inflate.unconsumed_tail
            while more := inflate.decompress(inflate.unconsumed_tail, _CHUNK):
                yield more
        except zlib.error:
            raise self.error("cannot be decompressed") from None

    def _compare(self, crc: int) -> None:
        if crc != self.crc:
            raise self.error("has another checksum than it says, so the file is damaged")
        self.file.checked.add(self.start)
