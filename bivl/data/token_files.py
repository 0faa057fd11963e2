"""The ids of all texts of a source as arrays: in memory, or as memory-mapped files on disk."""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from bivl.core.errors import Undecodable, UserError
from bivl.data.tokenizers import Tokenizer

_VERSION = 1  # of the files
_NAMES = ("tokens", "sentences", "documents")
_LINES = 4096  # tokenized at a time, or
_CHARACTERS = 2**22


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Texts as ids. A line with text is a sentence, ended by eos; other lines are left out.

    tokens: uint16 or uint32 [T], all sentences in a row.
    sentences: int64 [S], where each sentence stops in `tokens`.
    documents: int64 [D], where each document stops in `sentences`.
    folder: where the three are files, else None.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    folder: pathlib.Path | None = None


def tokenized(
    source: Any, tokenizer: Tokenizer, cache: str | os.PathLike | None = None
) -> Tokenized:
    """The texts of `source`, in memory; or with `cache` in files there, written where they are not.

    Lines are stripped first, as by fairseq's `examples/roberta/multiprocessing_bpe_encoder.py`.
    Records that are undecodable are left out.

    Raises:
      UserError: records without text, files that cannot be written or are damaged.
    """
    kinds = _dtypes(tokenizer)
    if not cache:
        files = [io.BytesIO() for _ in kinds]
        _tokenize(source, tokenizer, files)
        tokens, sentences, documents = (
            np.frombuffer(f.getbuffer(), kind) for f, kind in zip(files, kinds, strict=True)
        )
        return Tokenized(tokens, sentences, documents)
    folder = pathlib.Path(cache).expanduser() / _digest(source, tokenizer)
    if not folder.is_dir():
        publish(folder, lambda new: _write(source, tokenizer, new))
    arrays = [mapped(folder / f"{name}.npy") for name in _NAMES]
    tokens, sentences, documents = arrays
    if (
        any(array.ndim != 1 for array in arrays)
        or tuple(array.dtype for array in arrays) != kinds
        or (sentences[-1:].tolist() or [0]) != [len(tokens)]
        or (documents[-1:].tolist() or [0]) != [len(sentences)]
    ):
        raise damaged(folder / "tokens.npy")
    return Tokenized(tokens, sentences, documents, folder)


def publish(target: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Makes a file or folder whole or not at all: `write(path)` makes it elsewhere, then it moves.

    Two processes may do so at the same time; the result of one is kept.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            new = pathlib.Path(scratch) / target.name
            write(new)
            try:
                new.rename(target)
            except OSError:
                if not target.exists():  # else another process was faster
                    raise
    except OSError as error:
        raise UserError(
            f"packed text cannot be written to {target.parent} ({error.strerror}); name another "
            "cache folder, or none to hold all in memory"
        ) from error


def mapped(path: str | os.PathLike) -> np.ndarray:
    """An array file, memory-mapped."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(pathlib.Path(path)) from error


def damaged(path: pathlib.Path) -> UserError:
    """What to raise for a bad file of a cache."""
    return UserError(f"packed text: {path} is missing or damaged; remove the folder {path.parent}")


def _digest(source: Any, tokenizer: Tokenizer) -> str:
    """A name for what a source says of itself and for the tokenizer."""
    describe = getattr(source, "describe", None)
    names = describe() if describe else (getattr(source, "title", ""), getattr(source, "split", ""))
    digest = hashlib.sha256()
    for part in (_VERSION, names, len(source), tokenizer.kind, tokenizer.size, tokenizer.special):
        digest.update(repr(part).encode("utf-8", "backslashreplace") + b"\0")
    digest.update(tokenizer.data)
    return digest.hexdigest()[:24]


def _write(source: Any, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Three array files, of which nothing is held in memory."""
    folder.mkdir()
    kinds = _dtypes(tokenizer)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in _NAMES]
        for file, kind in zip(files, kinds, strict=True):
            _header(file, kind, 0)
        starts = [file.tell() for file in files]
        _tokenize(source, tokenizer, files)
        for file, kind, start in zip(files, kinds, starts, strict=True):
            size = file.tell() - start
            file.seek(0)
            _header(file, kind, size // kind.itemsize)
            if file.tell() != start:  # NumPy pads the header for growth, so this does not happen
                raise AssertionError("the header of an array file has grown")


def _header(file: Any, kind: np.dtype, size: int) -> None:
    description = np.lib.format.dtype_to_descr(kind)
    np.lib.format.write_array_header_1_0(
        file, {"descr": description, "fortran_order": False, "shape": (size,)}
    )


def _dtypes(tokenizer: Tokenizer) -> tuple[np.dtype, np.dtype, np.dtype]:
    token = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    return np.dtype(token), np.dtype(np.int64), np.dtype(np.int64)


def _tokenize(source: Any, tokenizer: Tokenizer, files: Sequence[Any]) -> None:
    """Appends tokens, sentences and documents to three binary files."""
    eos = np.array([tokenizer.eos], np.int32)
    kinds, tokens, sentences = _dtypes(tokenizer), 0, 0
    for lines, document in _batches(source):
        rows = tokenizer.encode_all(lines)
        kept = [k for k, row in enumerate(rows) if len(row)]
        if not kept:
            continue
        parts = (
            np.concatenate([part for k in kept for part in (rows[k], eos)]),
            tokens + np.cumsum([len(rows[k]) + 1 for k in kept]),
            sentences + np.cumsum(np.unique(document[kept], return_counts=True)[1]),
        )
        for file, part, kind in zip(files, parts, kinds, strict=True):
            file.write(part.astype(kind).tobytes())
        tokens, sentences = int(parts[1][-1]), int(parts[2][-1])


def _batches(source: Any) -> Iterator[tuple[list[str], np.ndarray]]:
    """(lines, the document of each, by number): whole documents, some thousand lines at a time."""
    lines, document, characters, left_out = [], [], 0, 0
    for index in range(len(source)):
        try:
            text = source[index].get("text")
        except Undecodable:
            left_out += 1
            continue
        if text is None:
            raise UserError(
                "the data has no text; set data.fields.text to the feature that holds it"
            )
        # Only \n ends a line; splitlines knows several more ends.
        filled = [line for line in map(str.strip, text.split("\n")) if line]
        lines += filled
        document += [index] * len(filled)
        characters += len(text)
        if len(lines) >= _LINES or characters >= _CHARACTERS:
            yield lines, np.array(document)
            lines, document, characters = [], [], 0
    if left_out:
        logging.warning("left out %d of %d records: no readable text", left_out, len(source))
    if lines:
        yield lines, np.array(document)
