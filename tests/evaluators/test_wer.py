import logging as python_logging

import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core.errors import GuardStop, UserError
from bivl.data.decoding import Letters
from bivl.evaluators import wer

SAID = ["THE CAT SAT", "A DOG", "ON THE MAT TODAY"]
HEARD = ["THE CAT SAT", "A DIG IN", "ON MAT TODAY"]  # 0, 1 substituted and 1 added, 1 missing


@pytest.fixture
def heard():
    """predict: log-probabilities that spell the frames `x`, all of them valid up to `length`."""

    def log_probs(params, extras, batch):
        hot = jnp.where(batch["x"][..., None] == jnp.arange(29), 0.0, -20.0)
        return hot * params, batch["length"]

    return {"log_probs": log_probs}


def pad(rows, length):
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)


def corpus(said=tuple(SAID), heard=tuple(HEARD)):
    """Each letter is a frame and a blank; after the valid frames comes nonsense."""
    letters = Letters()
    frames = [np.stack([letters.encode(t), 0 * letters.encode(t)], 1).ravel() for t in heard]
    length = np.array([len(row) for row in frames], np.int32)
    x = pad(frames, 60)
    x[np.arange(60) >= length[:, None]] = 5
    return {
        "x": x,
        "length": length,
        "transcript": pad([letters.encode(text) for text in said], 40),
    }


def run(heard, splits_of, data, scale=1.0, **settings):
    return wer.make(heard, splits_of(data, data, batch_size=2), settings)(jnp.float32(scale), None)


def distance(a, b):
    """Levenshtein's, the textbook table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            options = table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (x != y)
            table[i + 1, j + 1] = min(options)
    return table[-1, -1]


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_rates_are_summed_over_the_corpus(heard, splits_of, decoder):
    found = run(heard, splits_of, corpus(), decoder=decoder, width=4)
    assert found["wer"] == pytest.approx((0 + 2 + 1) / (3 + 2 + 4))
    letters = sum(distance(a, b) for a, b in zip(SAID, HEARD, strict=True))
    assert found["cer"] == pytest.approx(letters / sum(map(len, SAID)))


def test_nothing_heard_and_nothing_said(heard, splits_of):
    found = run(heard, splits_of, corpus(("A B", ""), ("", "C")))
    assert found["wer"] == pytest.approx(3 / 2)
    with pytest.raises(UserError, match="no words to compare with; check eval_data.test"):
        run(heard, splits_of, corpus(("", ""), ("", "C")))


def test_examples_are_logged(heard, splits_of, caplog):
    with caplog.at_level(python_logging.INFO, logger="absl"):
        python_logging.getLogger("absl").addHandler(caplog.handler)
        run(heard, splits_of, corpus())
        python_logging.getLogger("absl").removeHandler(caplog.handler)
    assert "said 'A DOG', heard 'A DIG IN'" in caplog.text


def test_a_language_model_repairs_words(splits_of, tmp_path):
    letters, frames = Letters(), corpus(("A DOG",), ("A DIG",))

    def log_probs(params, extras, batch):
        hot = jnp.where(batch["x"][..., None] == jnp.arange(29), 0.0, -20.0)
        unsure = hot.at[:, 6, letters.encode("O")[0]].set(-0.5)  # O nearly as likely as I
        return jnp.where(jnp.arange(60)[:, None] == 6, unsure, hot), batch["length"]

    path = tmp_path / "lm.arpa"
    path.write_text(
        "\\data\\\nngram 1=5\n\n\\1-grams:\n-9\t<s>\n-1\t</s>\n-4\t<unk>\n-1\tA\n-1\tDOG\n\\end\\\n"
    )
    predict = {"log_probs": log_probs}
    assert run(predict, splits_of, frames, decoder="beam")["wer"] == 0.5
    found = run(predict, splits_of, frames, decoder="beam", lm=str(path), alpha=1.0)
    assert found == {"wer": 0.0, "cer": 0.0}
    with pytest.raises(UserError, match="no word of config.eval.wer.lm=.* can be spelt with"):
        wer.make(predict, None, {"decoder": "beam", "lm": str(path), "letters": "abcdefg"})
    with pytest.raises(UserError, match="config.eval.wer.lm needs the beam; set"):
        wer.make(predict, None, {"lm": str(path)})


def test_what_cannot_be_scored_is_refused(heard, splits_of):
    data = corpus()
    with pytest.raises(UserError, match="no 'log_probs'; take wer out of"):
        run({}, splits_of, data)
    with pytest.raises(UserError, match="eval_data.test has no transcripts; name the feature"):
        run(heard, splits_of, {name: data[name] for name in ("x", "length")})
    with pytest.raises(UserError, match="the model has 29 classes but .*'.AB' makes 4 with blank"):
        run(heard, splits_of, data, letters="AB")
    with pytest.raises(GuardStop, match="not numbers"):
        run(heard, splits_of, data, scale=np.nan)
    with pytest.raises(UserError, match="config.eval.wer.decoder='best' is unknown"):
        run(heard, splits_of, data, decoder="best")
    with pytest.raises(UserError, match="config.eval.wer.width is 0; give a positive int"):
        run(heard, splits_of, data, decoder="beam", width=0)
