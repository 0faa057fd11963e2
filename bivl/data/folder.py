"""Class folders of image files on disk."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from bivl.core.errors import UserError
from bivl.data.images import read_file
from bivl.data.table import Column, Table, refuse_name, setting, split_names, split_ranges

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def folder_table(config: Mapping[str, Any]) -> Table:
    """Images in DIR/SPLIT/CLASS/*, or in DIR/CLASS/*, which then is one split called train.

    Classes are the sorted folder names over all splits, so that numbers agree between splits.
    The order is that of a hash of each file's path, the same on every machine, so slices such as
    train[90%:] mix the classes. Symbolic links that leave DIR are left out with a warning.
    """
    split, folder = setting(config, "split", "train"), setting(config, "dir")
    if not folder:
        raise UserError("data.dir is empty; kind=folder needs the folder of the images")
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir={folder} is not a folder; correct the path")
    listing = _Listing(root.resolve())
    splits = _split_folders(listing, root, split)
    classes = sorted({name for folders in splits.values() for name in folders})
    number = {name: label for label, name in enumerate(classes)}
    wanted = dict.fromkeys(name for name, _, _ in split_names(split))
    files = {part: listing.files(splits[part], number) for part in wanted}
    if listing.left_out:
        logging.warning(
            "left out %d symbolic links that leave %s, the first: %s",
            len(listing.left_out),
            root,
            next(iter(listing.left_out)),
        )
    title = f"the folder {root}"
    ranges = split_ranges(split, {part: len(rows) for part, rows in files.items()}, title)
    chosen = [files[part][i] for part, rows in ranges for i in rows]
    columns = {"image": Column("image"), "label": Column("label", tuple(classes))}
    return Table(title, columns, lambda wanted: FolderRows.of(chosen))


@dataclasses.dataclass(frozen=True)
class FolderRows:
    """Rows of image files, read when asked for."""

    paths: tuple[str, ...]
    labels: np.ndarray

    @classmethod
    def of(cls, files: list[tuple[str, int]]) -> "FolderRows":
        """Rows of (path, label) pairs."""
        return cls(tuple(p for p, _ in files), np.array([n for _, n in files], np.int32))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_file(self.paths[index]), "label": int(self.labels[index])}

    def where(self, index: int) -> str:
        """The path of a row."""
        return self.paths[index]


def _split_folders(
    listing: "_Listing", root: pathlib.Path, split: str
) -> dict[str, dict[str, str]]:
    """Split name -> class name -> folder, for either layout."""
    top = listing.folders(str(root))
    nested = {name: listing.class_folders(path) for name, path in top.items()}
    nested = {name: folders for name, folders in nested.items() if folders}
    wanted = [name for name, _, _ in split_names(split)]
    if nested and all(name in nested for name in wanted):
        return nested
    direct = listing.class_folders(str(root))
    if nested and (not direct or "train" in nested):
        missing = next(name for name in wanted if name not in nested)
        refuse_name(f"data.split: in {root} the split", missing, nested)
    if not direct:
        raise UserError(
            f"data.dir={root} holds no images; expected DIR/SPLIT/CLASS/*{{{','.join(SUFFIXES)}}}"
        )
    if any(name != "train" for name in wanted):
        other = next(name for name in wanted if name != "train")
        raise UserError(
            f"data.split={split!r}: {root} has class folders but no folder {other!r}, so all of "
            "it is the split train; use slices of it, such as train[:90%] and train[90%:]"
        )
    return {"train": direct}


class _Listing:
    """Directory listings below a root that never follow a symbolic link out of it."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.left_out: dict[str, None] = {}

    def _entries(self, folder: str) -> Iterator[os.DirEntry]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # Only links are resolved: a million resolve() calls would take half a minute.
                if entry.is_symlink() and not self._stays_inside(entry.path):
                    self.left_out[entry.path] = None
                    continue
                yield entry

    def _stays_inside(self, path: str) -> bool:
        return pathlib.Path(os.path.realpath(path)).is_relative_to(self.root)

    def folders(self, folder: str) -> dict[str, str]:
        """Name -> path of the folders directly inside."""
        return {entry.name: entry.path for entry in self._entries(folder) if entry.is_dir()}

    def class_folders(self, folder: str) -> dict[str, str]:
        """Name -> path of the folders directly inside that hold an image."""
        folders = self.folders(folder)
        return {n: path for n, path in folders.items() if any(True for _ in self._images(path))}

    def _images(self, folder: str) -> Iterator[os.DirEntry]:
        for entry in self._entries(folder):
            if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield entry

    def files(self, classes: dict[str, str], number: dict[str, int]) -> list[tuple[str, int]]:
        """All (path, label), in the order of a hash of CLASS/FILE."""
        keyed = []
        for name, folder in classes.items():
            for entry in self._images(folder):
                key = f"{name}/{entry.name}"
                digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8)
                keyed.append((digest.digest(), key, entry.path, number[name]))
        return [(path, label) for _, _, path, label in sorted(keyed)]
