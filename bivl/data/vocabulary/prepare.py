"""Trains a byte-level BPE vocabulary of 2,048 ids with RoBERTa's special ids (kind=small).

`source` is a folder with UTF-8 texts, *.txt; or the word `packaged`, which stands for what the
packaged vocabulary was trained on: the train splits of pydoc and of the emoji names.
"""

import json
import pathlib
import tempfile

import tokenizers

from bivl.core.errors import UserError
from bivl.data.prepared import emoji_table
from bivl.data.texts import pydoc_table, text_table
from bivl.data.vocabulary.layouts import SPECIAL

SIZE = 2048
MAX_BYTES = 2**28  # of all texts: they are held in memory


def prepare(source, out):
    """Writes OUT/small/vocab.json and merges.txt and returns that folder.

    The same texts and the same `tokenizers` give the same bytes. Raises UserError when there are
    no texts, too many, or too few for so many pieces, or when the folder is there already.
    """
    target = pathlib.Path(out) / "small"
    if target.exists():
        raise UserError(f"--out: {target} exists already; remove it or name another folder")
    vocabulary, merges = train(read_texts(source))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Built beside the target and renamed when whole: an interrupted run leaves no half set.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            built = pathlib.Path(scratch) / "small"
            built.mkdir()
            pieces = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
            lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
            (built / "vocab.json").write_text(pieces + "\n", encoding="utf-8", newline="\n")
            (built / "merges.txt").write_text("\n".join(lines), encoding="utf-8", newline="\n")
            built.rename(target)
    except OSError as error:
        raise UserError(f"--out: cannot write {target} ({error.strerror}); name another") from None
    return target


def read_texts(source):
    """The texts that `source` stands for."""
    if source == "packaged":
        parts = [table({"split": "train"}).rows(("text",)) for table in (pydoc_table, emoji_table)]
        texts = [part[i]["text"] for part in parts for i in range(len(part))]
        return [text.decode() if isinstance(text, bytes) else text for text in texts]
    if not pathlib.Path(source).is_dir():
        raise UserError(
            f"--source: {source} is not a folder; name one with *.txt files, or write packaged"
        )
    rows, texts, size = text_table({"dir": source}).rows(("text",)), [], 0
    for index in range(len(rows)):
        texts.append(rows[index]["text"])
        size += len(texts[-1])
        if size > MAX_BYTES:
            raise UserError(
                f"--source: {source} holds more than {MAX_BYTES} characters; a part of them is "
                "enough for a vocabulary"
            )
    return texts


def train(texts):
    """-> (piece -> id in the order of ids, merges in their order)."""
    splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())  # pyright: ignore (not our tokenizers)
    model.pre_tokenizer = splitter
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE - 1,
        special_tokens=list(SPECIAL[:4]),
        initial_alphabet=sorted(splitter.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(sorted(texts), trainer)
    tree = json.loads(model.to_str())["model"]
    vocabulary = dict(sorted(tree["vocab"].items(), key=lambda item: item[1]))
    if len(vocabulary) != SIZE - 1:
        raise UserError(
            f"--source: the texts give {len(vocabulary) + 1} pieces only, not {SIZE}; add texts"
        )
    return vocabulary | {SPECIAL[4]: SIZE - 1}, tree["merges"]
