import gzip
import itertools
import math
import pickle

import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.data import decoding
from bivl.data.decoding import ArpaLM, Letters, beam_search, greedy

ARPA = """
\\data\\
ngram 1=6
ngram 2=5
ngram 3=1

\\1-grams:
-99\t<s>\t-0.5
-1.2\t</s>
-1.5\t<UNK>\t-0.1
-0.7\tA\t-0.3
-0.9\tB\t-0.2
-1.1\tAB\t-0.4

\\2-grams:
-0.2\t<s> A\t-0.15
-0.4\tA B\t-0.25
-0.8\tB </s>
-0.3\tAB </s>
-0.6\tB A

\\3-grams:
-0.05\t<s> A B

\\end\\
"""
# What the lines above give for some sentences, by hand: log10 P with <s> and </s>.
SENTENCES = {
    "A": -0.2 + (-0.15 - 0.3 - 1.2),  # </s> after <s> A and after A is unknown: backs off twice
    "A B": -0.2 - 0.05 - 0.25 - 0.8,  # B </s> after A B, whose back-off weight is -0.25
    "AB": -0.5 - 1.1 - 0.3,  # no <s> AB; AB </s> has no context to lose
    "B A": (-0.5 - 0.9) - 0.6 + (-0.3 - 1.2),  # B A has no weight, A has
    "AA": (-0.5 - 1.5) + (-0.1 - 1.2),  # an unknown word
    "": -0.5 - 1.2,
}


@pytest.fixture
def lm(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA)
    return ArpaLM.read(str(path))


def random_frames(rng, frames, classes, sharpness=1.5):
    logits = sharpness * rng.normal(size=(frames, classes))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def merge(path):
    """An alignment -> its labelling (blank 0)."""
    return tuple(label for label, _ in itertools.groupby(path) if label)


def exact(log_probs):
    """P of every labelling, summed over all alignments."""
    found = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        probability = math.exp(sum(log_probs[t, k] for t, k in enumerate(path)))
        found[merge(path)] = found.get(merge(path), 0.0) + probability
    return found


def plain_search(log_probs, width):
    """Algorithm 1 of Hannun et al. with dictionaries and plain probabilities."""
    beam = {(): (1.0, 0.0)}
    for frame in np.exp(log_probs):
        following = {}

        def add(prefix, blank, letter, following=following):
            old = following.get(prefix, (0.0, 0.0))
            following[prefix] = old[0] + blank, old[1] + letter

        for prefix, (blank, letter) in beam.items():
            add(prefix, (blank + letter) * frame[0], 0.0)
            for k in range(1, len(frame)):
                if prefix and prefix[-1] == k:
                    add(prefix, 0.0, letter * frame[k])
                    add((*prefix, k), 0.0, blank * frame[k])
                else:
                    add((*prefix, k), 0.0, (blank + letter) * frame[k])
        best = sorted(following, key=lambda p: -sum(following[p]))[:width]
        beam = {prefix: following[prefix] for prefix in best}
    return list(max(beam, key=lambda p: sum(beam[p])))


def test_greedy_merges_then_drops_blanks():
    path = [0, 2, 2, 0, 2, 1, 1, 0, 0, 3]
    log_probs = np.log(np.full((10, 4), 0.1))
    log_probs[range(10), path] = 0.0
    assert greedy(log_probs) == [2, 2, 1, 3]
    assert greedy(log_probs, 5) == [2, 2]
    assert greedy(log_probs, 0) == []
    assert greedy(log_probs, blank=2) == [0, 0, 1, 0, 3]


def test_beam_sums_alignments_where_greedy_cannot():
    log_probs = np.log([[0.6, 0.4], [0.6, 0.4]])
    assert greedy(log_probs) == []  # 0.36 against 0.64 for "a" in three alignments
    assert beam_search(log_probs, width=3) == [1]


@pytest.mark.parametrize("seed", range(25))
def test_a_wide_beam_is_exact(seed):
    log_probs = random_frames(np.random.default_rng(seed), 4, 3)
    probability = exact(log_probs)
    best = max(probability, key=probability.get)
    assert beam_search(log_probs, width=100) == list(best)


@pytest.mark.parametrize("seed", range(12))
def test_a_narrow_beam_prunes_as_the_algorithm_says(seed):
    log_probs = random_frames(np.random.default_rng(seed), 14, 5, sharpness=0.8)
    for width in (1, 2, 3, 8):
        assert beam_search(log_probs, width=width) == plain_search(log_probs, width)


def test_only_the_given_frames_count():
    log_probs = random_frames(np.random.default_rng(0), 9, 4)
    assert beam_search(log_probs, 5) == beam_search(log_probs[:5])
    assert beam_search(log_probs, 0) == []
    assert beam_search(np.full((2, 3), -np.inf)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_wide_beam_with_a_language_model_is_exact(seed, lm):
    letters = Letters("AB")  # blank, |, A, B
    rng = np.random.default_rng(100 + seed)
    log_probs = random_frames(rng, 4, letters.size)
    alpha, beta = rng.uniform(0.2, 2.0), rng.uniform(-1.0, 2.0)
    score = {}
    for ids, probability in exact(log_probs).items():
        words = "".join("?|AB"[i] for i in ids).replace("|", " ").split()
        prior = sentence(lm, words) * math.log(10)
        score[ids] = math.log(probability) + alpha * prior + beta * len(words)
    options = {"lm": lm, "letters": letters, "alpha": alpha, "beta": beta}
    found = beam_search(log_probs, width=400, **options)
    assert score[tuple(found)] == pytest.approx(max(score.values()), abs=1e-9)
    # "A|" and "|A" are the same words as "A": other ids of the same score would be as good.
    assert letters.decode(found) == letters.decode(max(score, key=score.get))


def sentence(lm, words):
    total, context = 0.0, lm.start
    for word in (*words, lm.end):
        log10, context = lm.score(context, word)
        total += log10
    return total


def test_the_language_model_changes_the_answer(lm):
    letters = Letters("AB")
    log_probs = np.log(np.full((3, 4), 0.01))
    log_probs[0, 2], log_probs[1, 1], log_probs[1, 3] = np.log([0.97, 0.45, 0.53])
    log_probs[2, 3] = np.log(0.97)
    assert letters.decode(beam_search(log_probs)) == "AB"
    options = {"lm": lm, "letters": letters, "alpha": 1.0, "beta": 0.0}
    assert letters.decode(beam_search(log_probs, **options)) == "A B"


@pytest.mark.parametrize(("text", "expected"), SENTENCES.items())
def test_back_off(lm, text, expected):
    assert sentence(lm, text.split()) == pytest.approx(expected)


def test_contexts_are_bounded_and_unknown_words_marked(lm):
    assert lm.order == 3
    assert lm.score(("A", "B"), "A")[1] == ("B", "A")
    assert lm.score(("<s>",), "nowhere")[1] == ("<s>", "<unk>")
    assert sorted(lm.vocabulary) == ["A", "AB", "B"]


def test_a_model_without_unk_forbids_unknown_words():
    lm = ArpaLM({("A",): -1.0, ("</s>",): -1.0}, {})
    assert lm.score((), "B") == (-100.0, ())


def test_gzip_is_read_alike(tmp_path, lm):
    path = tmp_path / "lm.gz"
    path.write_bytes(gzip.compress(ARPA.encode()))
    packed = ArpaLM.read(str(path))
    for text in SENTENCES:
        assert sentence(packed, text.split()) == sentence(lm, text.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no line \\data\\"),
        (ARPA.replace("ngram 2=5", "ngram 2=6"), "announces .* and it holds"),
        (ARPA.replace("ngram 2=5", "ngram 2=4"), "more 2-grams than its header"),
        (ARPA[: ARPA.index("\\2-grams")], "announces .* and it holds"),
        (ARPA.replace("-0.9\tB", "-0.9x\tB"), "could not convert"),
        (ARPA.replace("-0.9\tB", "nan\tB"), "no finite logarithms"),
        (ARPA.replace("\tA B\t", "\tA B C D\t"), "no n-gram of 2 words"),
        (ARPA.replace("ngram 1=6", "ngram 1=99999999999"), "prune it"),
        (ARPA.replace("-0.9\tB", "-0.9\t" + "B" * 5000), "line over 4096 bytes"),
        ("\\data\\\n\\end\\\n", "announces {} n-grams"),
    ],
)
def test_damaged_models_are_refused(tmp_path, text, message):
    path = tmp_path / "lm.arpa"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        ArpaLM.read(str(path))
    assert "lm.arpa" in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_models_are_refused(tmp_path):
    packed = gzip.compress(ARPA.encode())
    for name, data in (("cut.gz", packed[:-30]), ("bad.arpa", b"\\data\\\n\xff\xfe\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.*; give an ARPA file"):
            ArpaLM.read(str(tmp_path / name))
    for path in (tmp_path, tmp_path / "absent.arpa"):
        with pytest.raises(UserError, match="cannot read the language model .*; give an ARPA"):
            ArpaLM.read(str(path))


def test_letters_there_and_back():
    letters = Letters()
    assert letters.size == 29 and letters.boundary == 1
    assert letters.encode("  he isn't\there ").dtype == np.int32
    assert letters.decode(letters.encode("  he isn't\there ")) == "HE ISN'T HERE"
    assert letters.encode("E T").tolist() == [2, 1, 3]
    assert letters.decode([0, 1, 2, 2, 1, 1, 3, 0, -1]) == "EE T"
    assert letters.encode(" ").tolist() == [] and letters.decode([]) == ""
    assert pickle.loads(pickle.dumps(letters)) == letters


def test_case_rule():
    assert Letters("abc").decode(Letters("abc").encode("A Bc")) == "a bc"
    assert Letters("aA").encode("aA").tolist() == [2, 3]
    assert Letters("אב").encode("אב").tolist() == [2, 3]
    composed, decomposed = "\u00e9", "e\u0301"
    assert Letters(decomposed).encode(composed).tolist() == [2]


def test_letters_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="holds '7', which config.letters=.* lacks; add it there"):
        Letters().encode("7 seas")
    for text in ("", "|", "AAB", "A B", "A||"):
        with pytest.raises(UserError, match="must hold each letter once"):
            Letters(text)
    assert Letters("A|B").boundary == 2


def test_a_language_model_needs_letters(lm):
    with pytest.raises(ValueError, match="needs the letters"):
        beam_search(np.zeros((1, 3)), lm=lm)
    assert decoding.BLANK == 0
