"""Folders of sound files with transcripts or class names, and the layout of LibriSpeech."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from bivl.core.errors import UserError
from bivl.data import transcripts
from bivl.data.audio import SUFFIXES
from bivl.data.table import Column, Table, refuse_name, setting, split_names, split_ranges
from bivl.data.transcripts import Files

_USUAL_SPLITS = {"train", "test", "dev", "val", "valid", "validation", "eval"}
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
    texts = {name: transcripts.texts_of(files) for name, files in parts.items()}
    without = [folders[name] for name in texts if not texts[name]]
    if without and len(without) < len(texts):
        raise UserError(f"{without[0]} has no transcripts as other splits do; add transcripts.tsv")
    labels: dict[str, int] = {}
    if without:
        everywhere = {
            transcripts.folder_of(key)
            for path in folders.values()
            for key in transcripts.sounds(dict(walk(path)))
        }
        if "" not in everywhere and len(everywhere) > 1:
            labels = {name: number for number, name in enumerate(sorted(everywhere))}
    rows = {
        name: [
            (key, files[key], texts[name].get(key, ""), labels.get(transcripts.folder_of(key), 0))
            for key in (texts[name] or transcripts.sounds(files))
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
        if any(key.endswith(transcripts.LIBRISPEECH) for key, _ in walk(path))
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
            for key, text in transcripts.texts_of(files).items()
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
    top = {name: path for name, path in top.items() if any(map(transcripts.is_sound, walk(path)))}
    whole = bool(transcripts.sounds(beside) or transcripts.find(beside))
    if not whole and all(name in top for name in wanted):
        return top
    usual = [name for name in top if name.replace("_", "-").split("-")[0] in _USUAL_SPLITS]
    if not whole and usual:
        missing = next(name for name in wanted if name not in top)
        refuse_name(f"data.split: in {walk.root} the split", missing, top)
    if not top and not transcripts.sounds(beside):
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
