"""Documents to blocks of tokens: an index of fixed cuts, made once, in the way of fairseq.

Each line of a document is a sentence: its ids and eos. A block is bos and at most length - 1
tokens of sentences in a row.
"""

import bisect
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from bivl.core.errors import UserError
from bivl.data import token_files
from bivl.data.table import refuse_name
from bivl.data.tokenizers import Tokenizer

BREAK_MODES = ("complete_doc", "none")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """N blocks of tokens by number; stands in for a `sources.Source`.

    A record is {"tokens": int32 [n], bos first, 1 < n <= length; "id": its number}. Where the
    arrays are memory-mapped files it pickles as their paths.
    """

    title: str
    split: str
    bos: int
    tokens: np.ndarray  # uint16 or uint32 [T], all sentences in a row
    bounds: np.ndarray  # int64 [N, 2], start and stop of each block in `tokens`
    paths: tuple[str, str] | None = None  # the files of these two arrays

    fields = (("tokens", "tokens", None),)
    classes = None

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start, stop = self.bounds[index]
        record = np.empty(stop - start + 1, np.int32)
        record[0], record[1:] = self.bos, self.tokens[start:stop]
        return {"tokens": record, "id": int(index)}

    def where(self, index: int) -> str:
        """Where a block comes from, for messages."""
        return f"block {index} of {self.title}, {self.split}"

    def describe(self) -> str:
        """One line: what it is, how many blocks and tokens."""
        return f"{self.title}, {self.split}: {len(self)} blocks of {len(self.tokens)} tokens"

    def __reduce__(self):
        arrays = (None, None) if self.paths else (self.tokens, self.bounds)
        return _unpickle, (self.title, self.split, self.bos, *arrays, self.paths)


def _unpickle(title, split, bos, tokens, bounds, paths) -> Blocks:
    if paths:
        tokens, bounds = map(token_files.mapped, paths)
    return Blocks(title, split, bos, tokens, bounds, paths)


def pack(
    source: Any,
    tokenizer: Tokenizer,
    length: int,
    break_mode: str,
    cache: str | os.PathLike | None = None,
) -> Blocks:
    """Blocks of the texts of `source`, for masked language modeling.

    break_mode:
      complete_doc: whole sentences of one document, as many as fit, and never of two documents. A
        sentence longer than a block starts one and is cut at its end; its rest goes on like a
        sentence of its own. A block of a single token is left out. (fairseq leaves an overlong
        sentence whole, and its trainer then refuses or skips it; the rest is its rule.)
      none: all sentences of all documents in a row, cut every length - 1 tokens, the last block
        short.

    Args:
      source: random access to records with `text`, as `sources.Source`; undecodable ones are left
        out.
      length: most tokens of a block, bos included; at least 2.
      cache: a folder. Tokens and index are written there once, under a name made of what the
        source says of itself (title, split, number of records, fields) and of the tokenizer, and
        memory-mapped from then on, shared by all processes of a machine. Whoever changes texts
        but not their number empties it. Without it, all tokens are held in memory.

    Raises:
      UserError: records without text, nothing to make blocks of, a cache that cannot be written
        or is damaged.

    Source: fairseq `data/token_block_utils_fast.pyx` (cuts), `tasks/masked_lm.py` (bos in front of
    blocks of tokens_per_sample - 1).
    """
    if break_mode not in BREAK_MODES:
        refuse_name("break_mode", break_mode, BREAK_MODES)
    if length < 2:
        raise UserError(f"blocks of text of {length} tokens are too short; choose 2 or more")
    title, split = getattr(source, "title", "texts"), getattr(source, "split", "train")
    text = token_files.tokenized(source, tokenizer, cache)
    if text.folder:
        index = text.folder / f"{break_mode}-{length}.npy"
        bounds = _cached_bounds(index, text, length, break_mode)
        paths = (str(text.folder / "tokens.npy"), str(index))
    else:
        bounds, paths = _bounds(text, length - 1, break_mode), None
    if not len(bounds):
        raise UserError(
            f"{title}, {split} has no text for blocks of {length} tokens; choose other data in "
            "data.split and data.fields.text, or longer blocks"
        )
    logging.info(
        "%s, %s: %d documents, %d tokens, %d blocks of at most %d (%s)",
        *(title, split, len(text.documents), len(text.tokens), len(bounds), length, break_mode),
    )
    return Blocks(title, split, tokenizer.bos, text.tokens, bounds, paths)


def _cached_bounds(
    path: pathlib.Path, text: token_files.Tokenized, length: int, break_mode: str
) -> np.ndarray:
    if not path.is_file():
        made = _bounds(text, length - 1, break_mode)
        token_files.publish(path, lambda new: np.save(new, made, allow_pickle=False))
    bounds = token_files.mapped(path)
    good = bounds.dtype == np.int64 and bounds.ndim == 2 and bounds.shape[1] == 2
    if good and len(bounds):
        sizes = bounds[:, 1] - bounds[:, 0]
        inside = bounds.min() >= 0 and bounds.max() <= len(text.tokens)
        good = inside and sizes.min() > 0 and sizes.max() < length
    if not good:
        raise token_files.damaged(path)
    return bounds


def _bounds(text: token_files.Tokenized, block: int, break_mode: str) -> np.ndarray:
    """Start and stop of each block of at most `block` tokens, int64 [N, 2]."""
    total = len(text.tokens)
    if not total:
        return np.zeros((0, 2), np.int64)
    if break_mode == "none":
        start = np.arange(0, total, block)
        return np.stack([start, np.minimum(start + block, total)], 1)
    stop = np.asarray(text.sentences[text.documents - 1])
    whole = np.stack([np.concatenate([[0], stop[:-1]]), stop], 1)
    fits = whole[:, 1] - whole[:, 0] <= block
    # Most documents of most corpora fit: only the others are worth a loop.
    long = whole[~fits].tolist()
    cuts = [cut for first, last in long for cut in _cuts(text.sentences, first, last, block)]
    bounds = np.concatenate([whole[fits], np.array(cuts, np.int64).reshape(-1, 2)])
    bounds = bounds[bounds[:, 1] - bounds[:, 0] > 1]
    return bounds[np.argsort(bounds[:, 0])]


def _cuts(sentences: np.ndarray, start: int, stop: int, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of one document: up to the last end of a sentence that fits, else as much as fits."""
    first, last = np.searchsorted(sentences, [start, stop], "right")
    ends = sentences[first:last].tolist()
    while start < stop:
        fitting = bisect.bisect_right(ends, start + block)
        end = ends[fitting - 1] if fitting else start
        end = end if end > start else start + block
        yield start, end
        start = end
