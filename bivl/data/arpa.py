"""Word n-gram language models in ARPA files."""

import gzip
import math
import sys
import zlib
from collections.abc import Iterator

from bivl.core.errors import UserError


class ArpaLM:
    """A back-off n-gram model of words (Katz back-off, as the ARPA format stores it).

    A context is a tuple of at most order - 1 words, oldest first; `start` is that of a sentence.
    All n-grams are held as Python objects, some 200 bytes each: prune large models.
    """

    start = ("<s>",)
    end = "</s>"

    def __init__(self, log10: dict[tuple[str, ...], float], backoff: dict[tuple[str, ...], float]):
        self._log10, self._backoff = log10, backoff
        self.order = max(map(len, log10))

    @classmethod
    def read(cls, path: str) -> "ArpaLM":
        """Reads an ARPA file, plain or gzip (by its first bytes).

        At most 2**24 n-grams and 4 GiB of text. Raises UserError for a file that cannot be read,
        is too large, or does not hold what its header says.
        """
        try:
            with open(path, "rb") as raw:
                packed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                return cls(*_read_arpa(_lines(gzip.open(raw) if packed else raw)))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(
                f"cannot read the language model {path}: {why}; give an ARPA file, plain or .gz"
            ) from error

    @property
    def vocabulary(self) -> Iterator[str]:
        """The words, without <s>, </s> and <unk>."""
        return (gram[0] for gram in self._log10 if len(gram) == 1 and gram[0] not in _SPECIAL)

    def score(self, context: tuple[str, ...], word: str) -> tuple[float, tuple[str, ...]]:
        """log10 P(word | context), and the context of the next word.

        A word that is not in the model counts as <unk>; without that, as log10 P = -100 (KenLM's
        value).
        """
        if (word,) not in self._log10:
            word = "<unk>"
        gram, total = (*context, word)[-self.order :], 0.0
        following = gram[1:] if len(gram) == self.order else gram
        while gram not in self._log10 and len(gram) > 1:
            total += self._backoff.get(gram[:-1], 0.0)
            gram = gram[1:]
        return total + self._log10.get(gram, _UNKNOWN), following


_UNKNOWN = -100.0
_MAX_NGRAMS, _MAX_BYTES, _MAX_LINE = 2**24, 2**32, 2**12
_SPECIAL = ("<s>", "</s>", "<unk>")  # in any case: LibriSpeech's models write <UNK>


def _lines(file) -> Iterator[str]:
    """Stripped lines, within the limits."""
    size = 0
    while line := file.readline(_MAX_LINE + 1):
        size += len(line)
        if len(line) > _MAX_LINE or size > _MAX_BYTES:
            raise ValueError(f"it has a line over {_MAX_LINE} bytes, or over {_MAX_BYTES} in all")
        yield line.decode("utf-8").strip()


def _read_arpa(lines: Iterator[str]) -> tuple[dict, dict]:
    """log10 probabilities and back-off weights by n-gram."""
    if not any(line == "\\data\\" for line in lines):
        raise ValueError("it has no line \\data\\")
    sizes, found, log10, backoff, order = {}, {}, {}, {}, 0
    for line in lines:
        if line.startswith("ngram ") and not order:
            number, _, count = line[6:].partition("=")
            sizes[int(number)] = int(count)
            if sum(sizes.values()) > _MAX_NGRAMS:
                raise ValueError(f"it has over {_MAX_NGRAMS} n-grams, prune it")
        elif line == "\\end\\":
            break
        elif line.endswith("-grams:") and line.startswith("\\"):
            order = int(line[1:-7])
        elif line:
            fields = line.split()
            if not 0 < order <= len(fields) - 1 <= order + 1:
                raise ValueError(f"the line {line[:60]!r} is no n-gram of {order} words")
            words = [w.lower() if w.lower() in _SPECIAL else w for w in fields[1 : order + 1]]
            gram = tuple(sys.intern(word) for word in words)
            log10[gram], weight = float(fields[0]), float([*fields, 0][order + 1])
            if not math.isfinite(log10[gram] + weight):
                raise ValueError(f"the line {line[:60]!r} has no finite logarithms")
            if weight:
                backoff[gram] = weight
            found[order] = found.get(order, 0) + 1
            if found[order] > sizes.get(order, 0):
                raise ValueError(f"it has more {order}-grams than its header says")
    if not found or found != {number: count for number, count in sizes.items() if count}:
        raise ValueError(f"its header announces {sizes} n-grams and it holds {found}")
    return log10, backoff
