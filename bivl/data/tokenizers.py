"""Tokenizers: text to ids and back, from files on disk and never from the network.

A tokenizer splits text alone: it adds no special ids, and text that spells one (`<mask>`) stays
text.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.table import refuse_name, setting
from bivl.data.vocabulary import clip, layouts, pieces, wordpiece

MAX_BYTES = 2**26  # of one file; the largest vocabularies in use take 20 MB
_HERE = pathlib.Path(__file__).parent
# Kinds with files of their own, and the kind that reads such files from elsewhere.
_OWN = {
    "small": (_HERE / "vocabulary" / "small", "bpe"),
    "small_xlmr": (_HERE / "pieces" / "small_xlmr.model", "xlmr"),
    "bytes": (_HERE, "bpe"),
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of V = `size` pieces, special ones included; small to pickle, quick to reopen.

    kind: who splits, "bpe", "clip", "wordpiece", "sentencepiece", "xlmr", "bytes" or, for
      nobody, "ids".
    data: what that library is opened from.
    bos, pad, eos, unk, mask: the special ids. `unk` is what encode gives where it must, none of
      the others is ever an output of encode.
    """

    kind: str
    data: bytes = dataclasses.field(repr=False)
    size: int
    bos: int
    pad: int
    eos: int
    unk: int
    mask: int

    @property
    def special(self) -> tuple[int, ...]:
        """All special ids: bos, pad, eos, unk, mask."""
        return self.bos, self.pad, self.eos, self.unk, self.mask

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without bos and eos. A lone surrogate counts as U+FFFD."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts at a time, on several threads."""
        rows = self._codec[0]([_without_surrogates(text) for text in texts])
        # What only the merges need, and no id of ours names, is unknown.
        arrays = [np.array(row, np.int64) for row in rows]
        return [np.where(row < self.size, row, self.unk).astype(np.int32) for row in arrays]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids [n]; special ids, and numbers that are no id, are passed over."""
        special = self.special
        numbers = (int(i) for i in ids)
        return self._codec[1]([i for i in numbers if 0 <= i < self.size and i not in special])

    @functools.cached_property
    def _codec(self) -> tuple[Callable, Callable]:
        return _OPEN[self.kind](self.data)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_codec"}  # it holds functions


def load(config: Mapping[str, Any]) -> Tokenizer:
    """Opens the tokenizer that a `tokenizer` mapping {kind, path} or {kind, size} names.

    kind:
      small: ours, byte-level BPE with 2,048 ids, packaged; for smoke runs and small texts.
      small_xlmr: ours, a SentencePiece model with 8,192 ids as xlmr numbers them, packaged.
      bytes: one id a byte of UTF-8, 4 and above; 261 ids, no files.
      ids: numbers alone, of a model whose vocabulary is not at hand: `size` ids with the special
        ones of RoBERTa and XLM-R, 0 to 3 and the last. Texts are refused.
      bpe: byte-level BPE of GPT-2 and RoBERTa; `path` is a folder in the layout of Hugging Face
        (vocab.json with merges.txt, or tokenizer.json) or of fairseq (encoder.json with vocab.bpe
        and dict.txt). fairseq's ids are <s>, <pad>, </s>, <unk>, the lines of dict.txt in their
        order, <mask>. In the other layout special tokens have the ids that the files give them,
        and those that the files lack are appended in this same order.
      clip: CLIP's BPE of lower-cased words; `path` is OpenAI's bpe_simple_vocab_16e6.txt.gz or a
        folder with it, with vocab.json and merges.txt, or with tokenizer.json. bos and eos are
        <|startoftext|> and <|endoftext|>; pad, unk and mask are eos too, as there are no others.
      wordpiece: BERT's; `path` is vocab.txt, or a folder with it (and tokenizer_config.json, which
        says if text is lower-cased) or with tokenizer.json. bos and eos are [CLS] and [SEP].
      sentencepiece: `path` is a .model file, or a folder with exactly one. bos, pad, eos and unk
        are the model's own; those it has none of are appended behind its pieces in this order,
        and <mask> always is, as the last.
      xlmr: such a `path`, with the ids of XLM-R (and BEiT-3, whose file beit3.spm is): <s>, <pad>,
        </s>, <unk>, piece k of the model from 3 on is k + 1, and <mask> is the number of pieces
        plus 1. So 64,000 pieces give 64,002 ids.

    Raises:
      UserError: an unknown kind; a file that is missing, too large or damaged; a byte-level BPE
        with other rules than GPT-2's.
    """
    kind, path = setting(config, "kind", ""), setting(config, "path", "")
    if kind == "ids":
        return _numbers(setting(config, "size", 0))
    if kind not in KINDS:
        refuse_name("tokenizer.kind", kind, [*KINDS, "ids"])
    if kind in _OWN:
        if path:
            raise UserError(
                f"tokenizer.path={path} is set, but kind={kind} has its own files; use "
                f"kind={_OWN[kind][1]}, or leave the path empty"
            )
        path = _OWN[kind][0]
    elif not path:
        raise UserError(f"tokenizer.path is empty; kind={kind} needs its files")
    return KINDS[kind](pathlib.Path(path).expanduser())


def _load_bpe(folder: pathlib.Path) -> Tokenizer:
    if not folder.is_dir():
        wanted = _listed(layouts.LAYOUTS)
        raise UserError(f"tokenizer.path={folder} is not a folder; name one with {wanted}")
    return _from_files(folder, layouts.LAYOUTS, _make_bpe, "a GPT-2 or RoBERTa")


def _load_words(kind: str, module, what: str, path: pathlib.Path) -> Tokenizer:
    known = module.LAYOUTS if path.is_dir() else [(path.name,)]
    make = lambda names, contents: Tokenizer(kind, *module.make(names, contents))  # noqa: E731
    return _from_files(path if path.is_dir() else path.parent, known, make, what)


def _from_files(folder: pathlib.Path, known, make, what: str) -> Tokenizer:
    """The tokenizer of the first of the `known` layouts whose files the folder has."""
    layout = (all((folder / name).is_file() for name in names) for names in known)
    names = next(itertools.compress(known, layout), None)
    if not names:
        wanted = _listed(known)
        raise UserError(f"tokenizer.path={folder} has no tokenizer; name one with {wanted}")
    contents = tuple(_read(folder / name) for name in names)
    try:
        return make(names, contents)
    except Exception as error:  # the library raises what its own checks raise
        raise UserError(
            f"tokenizer.path={folder}: {' or '.join(names)} is damaged or of another kind "
            f"({_line(error)}); copy the files again, or name {what} tokenizer"
        ) from error


def _listed(known) -> str:
    return ", or ".join(" + ".join(names) for names in reversed(known))


@functools.lru_cache(4)  # by content, as a program asks several times for the same tokenizer
def _make_bpe(names: tuple[str, ...], contents: tuple[bytes, ...]) -> Tokenizer:
    return bpe_tokenizer(*layouts.parse(names, contents))


def bpe_tokenizer(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    size: int,
    add_prefix_space: bool = False,
) -> Tokenizer:
    """Byte-level BPE from parts.

    Args:
      vocabulary: piece -> id, with the five special pieces. A piece that only merges need has an
        id of at least `size`; where it is the outcome, the text becomes <unk>.
      merges: pairs of pieces of the vocabulary, the first to be merged first.
      size: V.
      add_prefix_space: whether a text gets a space in front where it has none.
    """
    import tokenizers

    model = tokenizers.models.BPE(dict(vocabulary), list(merges), unk_token="<unk>")
    codec = tokenizers.Tokenizer(model)  # pyright: ignore (it takes the library for this file)
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    codec.decoder = tokenizers.decoders.ByteLevel()
    special = (vocabulary[name] for name in layouts.SPECIAL)
    return Tokenizer("bpe", codec.to_str().encode(), size, *special)


def _load_pieces(kind: str, make, path: pathlib.Path) -> Tokenizer:
    if path.is_dir():
        found = sorted(path.glob("*.model"))
        if len(found) != 1:
            raise UserError(
                f"tokenizer.path={path} holds {len(found)} .model files; name the file itself"
            )
        path = found[0]
    data = _read(path)
    try:
        return Tokenizer(kind, data, *make(data))
    except Exception as error:
        raise UserError(
            f"tokenizer.path={path} is no SentencePiece model for kind={kind} ({_line(error)}); "
            "name another file, or copy it again"
        ) from error


_FIRST = 4  # the id of byte 0, behind <s>, <pad>, </s>, <unk>; <mask> comes last


def _load_bytes(path: pathlib.Path) -> Tokenizer:
    del path
    return Tokenizer("bytes", b"", 256 + _FIRST + 1, 0, 1, 2, 3, 256 + _FIRST)


def _open_bytes(data: bytes) -> tuple[Callable, Callable]:
    del data

    def encode(texts: list[str]) -> list[list[int]]:
        return [[byte + _FIRST for byte in text.encode()] for text in texts]

    return encode, lambda ids: bytes(i - _FIRST for i in ids).decode("utf-8", "replace")


def _numbers(size: Any) -> Tokenizer:
    if not (isinstance(size, int) and _FIRST < size <= layouts.MAX_PIECES):
        raise UserError(
            f"tokenizer.size={size!r} must lie above {_FIRST} and be at most {layouts.MAX_PIECES}; "
            "kind=ids needs the rows of the model's table"
        )
    return Tokenizer("ids", b"", size, 0, 1, 2, 3, size - 1)


def _open_numbers(data: bytes) -> tuple[Callable, Callable]:
    del data

    def refuse(texts):
        raise UserError(
            "tokenizer.kind=ids knows numbers alone, no texts; name the model's vocabulary: "
            "--config.tokenizer.kind=bpe --config.tokenizer.path=FOLDER, say"
        )

    return refuse, refuse


def _open_bpe(data: bytes) -> tuple[Callable, Callable]:
    import tokenizers

    model = tokenizers.Tokenizer.from_str(data.decode())
    return lambda texts: [row.ids for row in model.encode_batch_fast(texts)], model.decode


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read(path: pathlib.Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"tokenizer.path: cannot read {path} ({error.strerror}); correct the path"
        ) from error
    if not 0 < len(data) <= MAX_BYTES:
        raise UserError(
            f"tokenizer.path: {path} is empty or larger than {MAX_BYTES} bytes, so it is no "
            "tokenizer; copy it again"
        )
    return data


def _line(error: BaseException) -> str:
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]


_OPEN = {
    "bpe": _open_bpe,
    "clip": clip.opened,
    "wordpiece": _open_bpe,
    "sentencepiece": pieces.opened,
    "xlmr": pieces.opened_xlmr,
    "bytes": _open_bytes,
    "ids": _open_numbers,
}
KINDS: dict[str, Callable[[pathlib.Path], Tokenizer]] = {
    "small": _load_bpe,
    "small_xlmr": functools.partial(_load_pieces, "xlmr", pieces.make_xlmr),
    "bpe": _load_bpe,
    "clip": functools.partial(_load_words, "clip", clip, "a CLIP"),
    "wordpiece": functools.partial(_load_words, "wordpiece", wordpiece, "a BERT"),
    "sentencepiece": functools.partial(_load_pieces, "sentencepiece", pieces.make),
    "xlmr": functools.partial(_load_pieces, "xlmr", pieces.make_xlmr),
    "bytes": _load_bytes,
}
