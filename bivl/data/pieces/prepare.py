"""Trains a SentencePiece model of 8,190 pieces, which are 8,192 ids of XLM-R (kind=small_xlmr).

`source` is a folder with UTF-8 texts, *.txt; or the word `packaged`, which stands for what the
packaged model was trained on: the train splits of pydoc, of the emoji names and keywords, and the
words of 3,000 scenes and 500 statements.
"""

import io
import os
import pathlib
import tempfile

import sentencepiece

from bivl.core.errors import UserError
from bivl.data.prepared import emoji_table
from bivl.data.scene_words import ANSWERS
from bivl.data.scenes import scenes_table
from bivl.data.texts import pydoc_table
from bivl.data.vocabulary import prepare as vocabulary

PIECES = 8190
FILE = "small_xlmr.model"


def prepare(source, out):
    """Writes OUT/small_xlmr.model and returns its path.

    The same texts and the same `sentencepiece` give the same bytes. Raises UserError when there
    are no texts, too many, or too few for so many pieces, or when the file is there already.
    """
    target = pathlib.Path(out) / FILE
    if target.exists():
        raise UserError(f"--out: {target} exists already; remove it or name another folder")
    model = train(read_texts(source))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target and renamed when whole: an interrupted run leaves no half file.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            built = pathlib.Path(scratch) / FILE
            built.write_bytes(model)
            os.replace(built, target)
    except OSError as error:
        raise UserError(f"--out: cannot write {target} ({error.strerror}); name another") from None
    return target


def read_texts(source):
    """The texts that `source` stands for."""
    if source != "packaged":
        return vocabulary.read_texts(source)
    statements = {"name": "statements", "num_examples": 500, "image_size": 16}
    parts = (
        (pydoc_table({}), ("text",)),
        (emoji_table({}), ("text", "keywords")),
        (scenes_table({"num_examples": 3000, "image_size": 16}), ("text", "question", "answer")),
        (scenes_table(statements), ("text",)),
    )
    texts = []
    for table, names in parts:
        rows = table.rows(names)
        for row in (rows[index] for index in range(len(rows))):
            texts += [ANSWERS[row[name]] if name == "answer" else row[name] for name in names]
    return [text.decode() if isinstance(text, bytes) else text for text in texts]


def train(texts):
    """-> the bytes of the model.

    Byte-pair merges, whose counts are whole numbers, so that machines agree. Text is taken as it
    is (tables of Unicode's normalization would take 240 kB), and a character that has no piece
    becomes pieces for its bytes, so nothing is unknown.
    """
    lines = [line.strip() for text in sorted(texts) for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=PIECES,
            normalization_rule_name="identity",
            byte_fallback=True,
            character_coverage=0.9999,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--source: the texts are too few for {PIECES} pieces ({str(error)[:80]!r}); add texts"
        ) from None
    return model.getvalue()
