"""From the probabilities of a CTC model to text: letters, greedy and prefix beam search, ARPA LMs.

Written in numpy, since pyctcdecode, the usual package, requires numpy < 2. The search is that of
Hannun et al. 2014 (arXiv 1408.2873, algorithm 1), the way of adding a language model that of Deep
Speech (arXiv 1412.5567, equation 12).
"""

import dataclasses
import functools
import math
import unicodedata
from collections.abc import Sequence

import numpy as np

from bivl.core.errors import UserError
from bivl.data.arpa import ArpaLM

BLANK = 0
BOUNDARY = "|"
# LibriSpeech's alphabet by falling frequency, the order of wav2vec 2.0's dictionary.
LIBRISPEECH = "|ETAONIHSRDLUMWCFGYPBVK'XJQZ"


@dataclasses.dataclass(frozen=True)
class Letters:
    """The vocabulary of a letter CTC model: blank 0, then `letters` in order.

    letters: config.letters; a word boundary "|" is put in front where it has none. Case rule: text
    is turned to upper case where no letter is lower case, to lower case where none is upper case,
    and left as it is where both occur.
    """

    letters: str = LIBRISPEECH

    def __post_init__(self):
        text = unicodedata.normalize("NFC", self.letters)
        text = text if BOUNDARY in text else BOUNDARY + text
        if len(text) < 2 or len(set(text)) < len(text) or any(c.isspace() for c in text):
            raise UserError(
                f"config.letters={self.letters!r} must hold each letter once and no space; write "
                f"the alphabet of the transcripts, such as {LIBRISPEECH!r}"
            )
        object.__setattr__(self, "letters", text)

    @property
    def size(self) -> int:
        """Number of classes, blank included."""
        return 1 + len(self.letters)

    @functools.cached_property
    def boundary(self) -> int:
        """The id of the word boundary."""
        return self._number[BOUNDARY]

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {letter: 1 + i for i, letter in enumerate(self.letters)}

    def fold(self, text: str) -> str:
        """The text in NFC and in the case of the letters."""
        text = unicodedata.normalize("NFC", text)
        if not any(c.islower() for c in self.letters):
            return text.upper()
        return text if any(c.isupper() for c in self.letters) else text.lower()

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 [n]: words joined by one boundary, none at the ends.

        (fairseq writes one at the end too.) Raises UserError for a letter that is not known.
        """
        folded = BOUNDARY.join(self.fold(text).replace(BOUNDARY, " ").split())
        unknown = next((c for c in folded if c not in self._number), None)
        if unknown is not None:
            raise UserError(
                f"a transcript holds {unknown!r}, which config.letters={self.letters!r} lacks; add "
                "it there, or clean the transcripts"
            )
        return np.array([self._number[c] for c in folded], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> words joined by single spaces; blanks and negative ids are left out."""
        text = "".join(self.letters[int(i) - 1] for i in ids if i > BLANK)
        return " ".join(text.replace(BOUNDARY, " ").split())


def greedy(log_probs: np.ndarray, length: int | None = None, blank: int = BLANK) -> list[int]:
    """The likeliest class of each frame, repeats merged, then blanks left out.

    log_probs [T, V], of which the first `length` frames count (None: all).
    """
    best = np.asarray(log_probs)[:length].argmax(axis=-1)
    first = np.ones(len(best), bool)
    first[1:] = best[1:] != best[:-1]
    return best[first & (best != blank)].tolist()


def beam_search(
    log_probs: np.ndarray,
    length: int | None = None,
    *,
    width: int = 32,
    lm: ArpaLM | None = None,
    letters: Letters | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    blank: int = BLANK,
) -> list[int]:
    """The best label sequence by prefix beam search.

    It maximises ln P(ids) + alpha ln P_lm(words) + beta (number of words), the last two with a
    language model only. P(ids) sums over the alignments that stay in the beam; the words are those
    between boundaries, scored when they end, the last one and </s> after the last frame.

    Args:
      log_probs: natural logarithms [T, V].
      length: the first frames that count, None for all.
      width: prefixes kept after each frame.
      lm: a model of words; it must be in the case of `letters`.
      letters: the vocabulary; needed with `lm`.
      alpha: weight of the model's natural logarithms. Flashlight, which fairseq decodes with,
        weighs log10: its weight w is alpha = w / ln 10 here.
      beta: what a word earns.
      blank: the class of blank.
    """
    tree = _Prefixes(lm, letters, alpha, beta)
    beam = np.zeros(1, np.int64)  # the empty prefix
    ends = np.zeros(1), np.full(1, -np.inf)  # ln P of those that end in blank, and in a letter
    for frame in np.asarray(log_probs, np.float64)[:length]:
        last, parent, bonus = tree.of(beam)
        stay_blank, stay_letter, longer = _advance(frame, beam, last, parent, ends, blank)
        score = np.c_[np.logaddexp(stay_blank, stay_letter), longer] + bonus[:, None]
        if lm is not None:
            score[:, 1 + letters.boundary] += tree.ended(beam)
        kept = np.argsort(-score, axis=None, kind="stable")[:width]
        kept = kept[score.flat[kept] > -np.inf]
        if not len(kept):
            return []  # a frame without any probability
        source, letter = np.divmod(kept, score.shape[1])
        letter = letter - 1  # -1: the prefix itself
        stays = letter < 0
        ends_letter = np.where(stays, stay_letter[source], longer[source, letter])
        ends = np.where(stays, stay_blank[source], -np.inf), ends_letter
        beam = tree.extend(beam[source], letter)
    final = np.logaddexp(*ends) + tree.finished(beam)
    return tree.ids(int(beam[np.argmax(final)]))


def _advance(frame, beam, last, parent, ends, blank):
    """ln P one frame [V] later: of the W prefixes themselves, ending in blank and in their last
    letter, each [W], and of those one letter longer [W, V]."""
    (ends_blank, ends_letter), total = ends, np.logaddexp(*ends)
    begun = np.flatnonzero(last >= 0)
    longer = total[:, None] + frame
    longer[begun, last[begun]] = ends_blank[begun] + frame[last[begun]]  # or it would be a repeat
    longer[:, blank] = -np.inf
    stay_blank = total + frame[blank]
    stay_letter = np.full(len(beam), -np.inf)
    stay_letter[begun] = ends_letter[begun] + frame[last[begun]]
    # A prefix grown from another one of the beam into one that is there too is the same prefix.
    place = {node: row for row, node in enumerate(beam.tolist())}
    for row in begun.tolist():
        source = place.get(int(parent[row]))
        if source is not None:
            grown = longer[source, last[row]]
            stay_letter[row] = np.logaddexp(stay_letter[row], grown)
            longer[source, last[row]] = -np.inf
    return stay_blank, stay_letter, longer


class _Prefixes:
    """All prefixes a search has seen, as a tree, so that each has one number; 0 is the empty one.

    Word states (LM context, letters of the word begun, score of the words ended) are kept only
    where there is a language model.
    """

    def __init__(self, lm, letters, alpha, beta):
        if lm is not None and letters is None:
            raise ValueError("a language model needs the letters")
        self._lm, self._letters, self._alpha, self._beta = lm, letters, alpha * math.log(10), beta
        self._nodes = [(-1, -1)]  # (last letter, parent)
        self._children: dict[tuple[int, int], int] = {}
        self._scores = [0.0]
        self._words = [(lm.start if lm else (), "")]
        self._ended: dict[int, tuple] = {}

    def of(self, beam):
        """Last letters, parents and LM scores of the words ended, each [W]."""
        last, parent = np.array([self._nodes[node] for node in beam], np.int64).T
        return last, parent, np.array([self._scores[node] for node in beam])

    def ended(self, beam):
        """[W]: what the word that each prefix has begun would add, should it end here."""
        return np.array([self._end(int(node))[0] for node in beam])

    def _end(self, node):
        """(score, context) after the word begun; an empty word is none."""
        if node not in self._ended:
            context, word = self._words[node]
            value = 0.0
            if word:
                log10, context = self._lm.score(context, word)
                value = self._alpha * log10 + self._beta
            self._ended[node] = value, context
        return self._ended[node]

    def extend(self, parents, letters):
        """The numbers of the prefixes `parents` [n], each one of `letters` longer; -1: as it is."""
        pairs = zip(parents.tolist(), letters.tolist(), strict=True)
        return np.array([self._child(*p) if p[1] >= 0 else p[0] for p in pairs], np.int64)

    def _child(self, parent, letter):
        if (parent, letter) in self._children:
            return self._children[parent, letter]
        child = self._children[parent, letter] = len(self._nodes)
        score, (context, word) = self._scores[parent], self._words[parent]
        if self._lm and letter == self._letters.boundary:
            value, context = self._end(parent)
            score, word = score + value, ""
        elif self._lm:
            word += self._letters.letters[letter - 1]
        self._nodes.append((letter, parent))
        self._scores.append(score)
        self._words.append((context, word))
        return child

    def finished(self, beam):
        """[W]: the LM scores of the prefixes as whole texts."""
        if self._lm is None:
            return np.zeros(len(beam))
        whole = []
        for node in beam.tolist():
            value, context = self._end(node)
            end, _ = self._lm.score(context, self._lm.end)
            whole.append(self._scores[node] + value + self._alpha * end)
        return np.array(whole)

    def ids(self, node):
        """The letters of a prefix."""
        found = []
        while node:
            letter, node = self._nodes[node]
            found.append(letter)
        return found[::-1]
