"""Folders of sound files with transcripts or class names, and the layout of LibriSpeech."""

import collections
import csv
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from bivl.core.errors import UserError
from bivl.data.audio import SUFFIXES
from bivl.data.table import Column, Table, refuse_name, setting, split_names, split_ranges

MAX_BYTES = 2**28  # 256 MiB of transcripts in one file; LibriSpeech's 960 hours have 50 MiB
_LIBRISPEECH = ".trans.txt"
_NAMES = ("transcripts.tsv", "transcripts.jsonl", "metadata.csv", "transcription")
_NOISE = "_background_noise_"  # in Speech Commands, a folder that is no class
_USUAL_SPLITS = {"train", "test", "dev", "val", "valid", "validation", "eval"}
Files = dict[str, str]  # path relative to the folder of the split, with slashes -> path
Row = tuple[str, str, str, int]  # path relative to that folder, path, text, label


def speech_folder_table(config: Mapping[str, Any]) -> Table:
    """WAV, FLAC and OGG files in DIR/SPLIT/**, or in DIR/**, which then is one split called train.

    Transcripts are read from one of these in the folder of the split: transcripts.tsv (path, tab,
    text), transcripts.jsonl ({"audio": path, "text": ...}), metadata.csv (columns file_name and
    transcription), transcription or *.transcription (`<s> words </s> (id)`), or from *.trans.txt
    anywhere below (`id words`); paths are relative to that folder, an id is a path without its
    suffix. The rows are the files that have one. Without transcripts, the rows are all files, and
    their folders' names are classes if every file lies in one and there are several.

    The order is that of a hash of each file's path, the same on every machine. Symbolic links
    that leave DIR are left out with a warning.

    Raises:
      UserError: no such folder, sounds or split; transcripts that cannot be read, or that name a
        file which is not there.
    """
    walk, split = _open(config), setting(config, "split", "train")
    folders = _split_folders(walk, split)
    parts = {name: dict(walk(folders[name])) for name, _, _ in split_names(split)}
    texts = {name: _transcripts(files) for name, files in parts.items()}
    without = [folders[name] for name in texts if not texts[name]]
    if without and len(without) < len(texts):
        raise UserError(f"{without[0]} has no transcripts as other splits do; add transcripts.tsv")
    labels: dict[str, int] = {}
    if without:
        everywhere = {_class(key) for path in folders.values() for key in _sounds(dict(walk(path)))}
        if "" not in everywhere and len(everywhere) > 1:
            labels = {name: number for number, name in enumerate(sorted(everywhere))}
    rows = {
        name: [
            (key, files[key], texts[name].get(key, ""), labels.get(_class(key), 0))
            for key in (texts[name] or _sounds(files))
        ]
        for name, files in parts.items()
    }
    return _table(walk, split, rows, not without, tuple(labels))


def librispeech_table(config: Mapping[str, Any]) -> Table:
    """LibriSpeech: DIR/SPLIT/SPEAKER/CHAPTER/*.flac with a *.trans.txt in each chapter.

    `dir` is the folder that holds train-clean-100 and so on, or the one above it (LibriSpeech);
    `split` names such folders: train-clean-100[:10%], dev-clean+dev-other. Texts are in capitals
    as they are there; the label is the speaker, numbered over all splits that `dir` has.

    Raises:
      UserError: as `speech_folder_table`.
    """
    walk, split = _open(config), setting(config, "split", "train")
    top, _ = walk.inside(walk.root)
    if "LibriSpeech" in top:
        top, _ = walk.inside(top["LibriSpeech"])
    folders = {
        name: path
        for name, path in top.items()
        if any(key.endswith(_LIBRISPEECH) for key, _ in walk(path))
    }
    if not folders:
        layout = "train-clean-100/SPEAKER/CHAPTER/*.trans.txt"
        raise UserError(
            f"data.dir={walk.root} holds no LibriSpeech; expected {layout} and the like"
        )
    speakers = {name for path in folders.values() for name in walk.inside(path)[0]}
    names = sorted(speakers, key=lambda name: (len(name), name))  # 9 before 10
    number = {name: label for label, name in enumerate(names)}
    rows: dict[str, list[Row]] = {}
    for name, _, _ in split_names(split):
        if name not in folders:
            refuse_name(f"data.split: in {walk.root} the split", name, folders)
        files = {key: path for key, path in walk(folders[name]) if key.count("/") == 2}
        rows[name] = [
            (key, files[key], text, number[key.split("/")[0]])
            for key, text in _transcripts(files).items()
        ]
    return _table(walk, split, rows, True, tuple(names))


def holds_speech(folder: str | os.PathLike, others: Sequence[str]) -> bool:
    """Whether sounds lie below a folder: the first file that ends as sounds do or as `others`."""
    files = (key.lower() for key, _ in _Walk(os.fspath(folder))(os.fspath(folder)))
    first = next((key for key in files if key.endswith((*SUFFIXES, *others))), "")
    return first.endswith(SUFFIXES)


@dataclasses.dataclass(frozen=True)
class SpeechRows:
    """Rows of sound files by their paths, which `audio.decode_audio` takes."""

    paths: tuple[str, ...]
    texts: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self.labels[index])
        return {"audio": self.paths[index], "text": self.texts[index], "label": label}

    def where(self, index: int) -> str:
        """The path of a row."""
        return self.paths[index]


def _table(
    walk: "_Walk", split: str, rows: dict[str, list[Row]], texts: bool, classes: tuple[str, ...]
) -> Table:
    """The table of the rows of each split, brought into the order of their hashes."""
    walk.warn()
    title = f"the folder {walk.root}"
    ranges = split_ranges(split, {name: len(part) for name, part in rows.items()}, title)
    ordered = {name: sorted(part, key=lambda row: _digest(row[0])) for name, part in rows.items()}
    chosen = [ordered[name][i][1:] for name, part in ranges for i in part]
    columns = {"audio": Column("audio")}
    if texts:
        columns["text"] = Column("text")
    if classes:
        columns["label"] = Column("label", classes)
    paths, words, labels = zip(*chosen, strict=True)
    speech = SpeechRows(paths, words, np.array(labels, np.int32))
    return Table(title, columns, lambda wanted: speech)


def _digest(key: str) -> tuple[bytes, str]:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), key


def _open(config: Mapping[str, Any]) -> "_Walk":
    folder = setting(config, "dir")
    if not folder:
        raise UserError("data.dir is empty; set it to the folder of the sounds")
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir={folder} is not a folder; correct the path")
    return _Walk(str(root))


def _split_folders(walk: "_Walk", split: str) -> Files:
    """Split name -> folder, for either layout."""
    wanted = [name for name, _, _ in split_names(split)]
    top, beside = walk.inside(walk.root)
    top = {name: path for name, path in top.items() if any(map(_is_sound, walk(path)))}
    whole = bool(_sounds(beside) or _find_transcripts(beside))
    if not whole and all(name in top for name in wanted):
        return top
    usual = [name for name in top if name.replace("_", "-").split("-")[0] in _USUAL_SPLITS]
    if not whole and usual:
        missing = next(name for name in wanted if name not in top)
        refuse_name(f"data.split: in {walk.root} the split", missing, top)
    if not top and not _sounds(beside):
        ends = ", ".join(SUFFIXES)
        raise UserError(f"data.dir={walk.root} holds no sounds; expected files that end in {ends}")
    if other := next((name for name in wanted if name != "train"), None):
        cure = "it is all the split train; use slices such as train[:90%] and train[90%:]"
        raise UserError(f"data.split={split!r}: {walk.root} has no split {other!r}, {cure}")
    return {"train": walk.root}


class _Walk:
    """Files below a root, in sorted order, never following a symbolic link out of it."""

    def __init__(self, root: str):
        self.root = root
        self._real = pathlib.Path(root).resolve()
        self._left_out: dict[str, None] = {}

    def __call__(self, folder: str) -> Iterator[tuple[str, str]]:
        """(path relative to the folder, path) of all files; a real folder is entered once."""
        seen, stack = set(), [("", folder)]
        while stack:
            prefix, path = stack.pop()
            if (real := os.path.realpath(path)) in seen:
                continue
            seen.add(real)
            inner = []
            for entry in self._entries(path):
                if entry.is_dir():
                    inner.append((f"{prefix}{entry.name}/", entry.path))
                elif entry.is_file():
                    yield prefix + entry.name, entry.path
            stack += reversed(inner)

    def inside(self, folder: str) -> tuple[Files, Files]:
        """Name -> path of the folders and of the files directly inside."""
        entries = self._entries(folder)
        folders = {entry.name: entry.path for entry in entries if entry.is_dir()}
        return folders, {entry.name: entry.path for entry in entries if entry.is_file()}

    def warn(self):
        """Logs what was left out."""
        if first := next(iter(self._left_out), None):
            message = "left out %d symbolic links that leave %s, the first: %s"
            logging.warning(message, len(self._left_out), self.root, first)

    def _entries(self, folder: str) -> list[os.DirEntry]:
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder} cannot be listed ({error.strerror}); correct it") from error
        return [entry for entry in found if not entry.name.startswith(".") and self._keep(entry)]

    def _keep(self, entry: os.DirEntry) -> bool:
        # Only links are resolved: a million resolve() calls would take half a minute.
        real = entry.is_symlink() and pathlib.Path(os.path.realpath(entry.path))
        inside = not real or real.is_relative_to(self._real)
        if not inside:
            self._left_out[entry.path] = None
        return inside


def _is_sound(file: tuple[str, str]) -> bool:
    return file[0].lower().endswith(SUFFIXES) and _class(file[0]) != _NOISE


def _sounds(files: Files) -> Files:
    return dict(filter(_is_sound, files.items()))


def _class(key: str) -> str:
    """The name of the folder in which a file lies, "" directly in that of the split."""
    return posixpath.basename(posixpath.dirname(key))


def _find_transcripts(files: Files) -> list[str]:
    """Files directly in a folder that hold its transcripts."""
    direct = [key for key in files if "/" not in key]
    return [key for key in direct if key in _NAMES or key.endswith(".transcription")]


def _transcripts(files: Files) -> dict[str, str]:
    """Sound file -> its text, for the files of one split; empty where there are no transcripts."""
    found = _find_transcripts(files)
    if len(found) > 1:
        raise UserError(f"{files[found[0]]} lies beside {', '.join(found[1:])}; keep one of them")
    found = found or [key for key in files if key.endswith(_LIBRISPEECH)]
    names, texts = _names(_sounds(files)) if found else {}, {}
    for key in found:
        for name, text in _pairs(files[key]):
            # Looked up and never joined to a path, so that no name leads out of the folder.
            sound = names.get(posixpath.normpath(posixpath.join(posixpath.dirname(key), name)))
            if not sound:
                cause = f"{files[key]}: {name!r} is not the name of one sound in its folder"
                raise UserError(f"{cause}; add the file or drop the line")
            if sound in texts:
                raise UserError(f"{files[key]}: {name!r} has two transcripts; drop one")
            texts[sound] = text
    return texts


def _names(sounds: Files) -> dict[str, str]:
    """What transcripts may call a sound -> the sound, "" for what two of them are called."""
    names: dict[str, str] = {}
    stems = {key: key.rpartition(".")[0] for key in sounds}
    for level in ({key: posixpath.basename(stems[key]) for key in sounds}, stems):
        count = collections.Counter(level.values())
        names |= {name: key if count[name] == 1 else "" for key, name in level.items()}
    return names | {key: key for key in sounds}


def _pairs(path: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each line of a transcript file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes; split the data set")
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 ({error}); correct it") from error
    if path.endswith(".csv"):
        yield from _csv(path, lines)
        return
    parse = next(parse for end, parse in _PARSERS.items() if path.endswith(end))
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not (pair := parse(line.strip("\r"))):
                raise UserError(f"{path}, line {number} cannot be read; correct or drop it")
            yield pair


def _csv(path: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    try:
        for row in csv.DictReader(line + "\n" for line in lines):
            name, text = row.get("file_name"), row.get("transcription")
            if name is None or text is None:
                raise UserError(f"{path} needs the columns file_name and transcription; add them")
            yield name, text
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file ({error}); correct it") from error


def _jsonl(line: str) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
        pair = (entry["audio"], entry["text"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return pair if all(isinstance(value, str) for value in pair) else None


def _cut(line: str, mark: str) -> tuple[str, str] | None:
    name, found, text = line.partition(mark)
    return (name, text.strip()) if found else None


def _sphinx(line: str) -> tuple[str, str] | None:
    text, bracket, name = line.rstrip().removesuffix(")").rpartition("(")
    text = text.strip().removeprefix("<s>").removesuffix("</s>").strip()
    return (name.strip(), text) if bracket else None


_PARSERS: dict[str, Callable[[str], tuple[str, str] | None]] = {
    ".tsv": functools.partial(_cut, mark="\t"),
    ".jsonl": _jsonl,
    _LIBRISPEECH: functools.partial(_cut, mark=" "),
    "transcription": _sphinx,
}
