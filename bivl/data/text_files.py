"""Where the records of text files lie: which files make a split, and byte ranges in them.

Files are not held in memory: an index of byte ranges is made once, and records are read when asked
for. Lines end with \\n or \\r\\n. `data.dir` is
- a file: all of it is the split train;
- a folder with files SPLIT.jsonl (.tsv, .txt) or SPLIT-00000-of-00010.jsonl, or with folders
  SPLIT/*.jsonl;
- a folder of files with other names: together they are the split train.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from bivl.core.errors import Undecodable, UserError
from bivl.data.table import refuse_name, setting, split_names, split_ranges

MAX_BYTES = 2**28  # 256 MiB; a longer line or document is refused
_CHUNK = 2**22
_HELD_OUT = ("dev", "test", "val")  # a file whose name starts so is never taken for training data
_SHARD = re.compile(r"(.+)-\d+-of-\d+")
Part = tuple[str, np.ndarray, np.ndarray]  # a path, and start and stop of ranges in that file


@dataclasses.dataclass(frozen=True)
class Spans:
    """n byte ranges in files: file int32, start and stop int64, [n] each; `file` indexes paths."""

    paths: tuple[str, ...]
    file: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, parts: list[Part]) -> "Spans":
        """Ranges of several files, one after another."""
        sizes = [len(start) for _, start, _ in parts]
        file = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
        start, stop = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
        return cls(tuple(path for path, _, _ in parts), file, start, stop)

    def __len__(self) -> int:
        return len(self.start)

    def part(self, rows: range) -> list[Part]:
        """The ranges of some rows, as `of` takes them."""
        kept = slice(rows.start, rows.stop)
        file, start, stop = self.file[kept], self.start[kept], self.stop[kept]
        return [(self.paths[k], start[file == k], stop[file == k]) for k in np.unique(file)]

    def read(self, index: int) -> bytes:
        """The bytes of one range; Undecodable where it is too long or the file is gone or cut."""
        start, size = int(self.start[index]), int(self.stop[index] - self.start[index])
        if size > MAX_BYTES:
            raise Undecodable(f"it is longer than {MAX_BYTES} bytes")
        try:
            with open(self.paths[self.file[index]], "rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise Undecodable(f"{type(error).__name__}: {error.strerror}") from error
        if len(data) < size:
            raise Undecodable("the file has become shorter")
        return data

    def where(self, index: int) -> str:
        """Path and byte of a range, for messages."""
        return f"{self.paths[self.file[index]]}, byte {self.start[index]}"


def wanted(config: Mapping[str, Any]) -> list[str]:
    """The splits that data.split names, each once."""
    names = split_names(setting(config, "split", "train"))
    return list(dict.fromkeys(name for name, _, _ in names))


def chosen(config: Mapping[str, Any], splits: Mapping[str, Spans], title: str) -> Spans:
    """The ranges that data.split names, out of those of whole splits."""
    sizes = {name: len(spans) for name, spans in splits.items()}
    ranges = split_ranges(setting(config, "split", "train"), sizes, title)
    return Spans.of([part for name, rows in ranges for part in splits[name].part(rows)])


def splits(
    config: Mapping[str, Any], kind: str, suffix: str
) -> tuple[pathlib.Path, dict[str, tuple[list[str], bool]]]:
    """(data.dir, split name -> (its files in order, whether they are several in a folder)).

    Raises:
      UserError: no such folder, no such files, a split in data.split that is not there.
    """
    folder = setting(config, "dir")
    if not folder:
        raise UserError(f"data.dir is empty; kind={kind} needs a folder or file of *{suffix}")
    root = pathlib.Path(folder).expanduser()
    if root.is_file():
        found = {"train": ([str(root)], False)}
    elif root.is_dir():
        found = _found(root, suffix)
    else:
        raise UserError(f"data.dir={folder} is neither a folder nor a file; correct the path")
    if not found:
        raise UserError(f"data.dir={root} holds no *{suffix}; correct data.dir or data.kind")
    for name in wanted(config):
        if name not in found:
            refuse_name(f"data.split: in {root} the split", name, found)
    return root, found


def _found(root: pathlib.Path, suffix: str) -> dict[str, tuple[list[str], bool]]:
    """The splits of a folder; links that leave it are left out, and so are hidden files."""
    home, left_out = root.resolve(), []

    def files(folder: pathlib.Path) -> list[pathlib.Path]:
        inside = []
        for path in sorted(folder.glob(f"[!.]*{suffix}")):
            stays = path.resolve().is_relative_to(home)
            (inside if stays else left_out).append(path)
        return [path for path in inside if path.is_file()]

    named: dict[str, list[str]] = {}
    for path in files(root):
        shard = _SHARD.fullmatch(path.stem)
        named.setdefault(shard[1] if shard else path.stem, []).append(str(path))
    folders = {path.name: files(path) for path in sorted(root.glob("[!.]*")) if path.is_dir()}
    nested = {
        name: ([str(path) for path in inside], len(inside) > 1)
        for name, inside in folders.items()
        if inside
    }
    if left_out:
        logging.warning(
            "left out %d symbolic links that leave %s, the first: %s",
            len(left_out),
            root,
            left_out[0],
        )
    if not ("train" in named or nested or any(name.startswith(_HELD_OUT) for name in named)):
        together = [path for paths in named.values() for path in paths]
        return {"train": (together, len(together) > 1)} if named else {}
    return {name: (paths, False) for name, paths in named.items()} | nested


def lines(path: str) -> Part:
    """The lines of a file that are not empty."""
    start, stop, filled = _scan(path)
    return path, start[filled], stop[filled]


def documents(paths: list[str], whole: bool) -> Spans:
    """The documents of some files: each file one (`whole`), or what empty lines separate."""
    parts = []
    for path in paths:
        start, stop, filled = _scan(path)
        if whole:
            some = int(filled.any())
            parts.append((path, start[:some], stop[len(stop) - some :]))
            continue
        padded = np.concatenate([[False], filled, [False]])
        first, last = filled & ~padded[:-2], filled & ~padded[2:]
        parts.append((path, start[first], stop[last]))
    return Spans.of(parts)


def _scan(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All lines of a file: start and stop (without \\n) int64 [n], filled bool [n].

    Not filled are lines of spaces and control characters only.
    """
    ends, filled, offset, open_line = [], [], 0, False
    try:
        with open(path, "rb") as file:
            skipped = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark
            file.seek(0)
            while data := file.read(_CHUNK):
                chunk = np.frombuffer(data, np.uint8)
                newlines = np.flatnonzero(chunk == ord("\n"))
                pieces = np.concatenate([[0], newlines + 1])
                pieces = pieces[pieces < len(chunk)]
                some = np.logical_or.reduceat(chunk > ord(" "), pieces)
                some[0] |= open_line
                ends.append(newlines + offset)
                filled.append(some[: len(newlines)])
                open_line = bool(some[-1]) if len(some) > len(newlines) else False
                offset += len(chunk)
    except OSError as error:
        raise UserError(f"data.dir: cannot read {path} ({error.strerror}); correct it") from error
    stop = np.concatenate([*ends, [offset]]).astype(np.int64)
    start = np.concatenate([[min(skipped, offset)], stop[:-1] + 1]).astype(np.int64)
    return start, stop, np.concatenate([*filled, [open_line]]).astype(bool)
