"""Word and character error rates of a CTC model, over the corpus, by jiwer.

(Substitutions + deletions + insertions) / reference words, each summed over the test split: not
the mean of the utterances' rates. Both sides pass through the same letters, so case and spacing
cannot differ; a number means something only with its decoder and language model beside it.
"""

import jiwer
import numpy as np
from absl import logging

from bivl.core.config import choice
from bivl.core.distributed import to_host
from bivl.core.errors import GuardStop, UserError
from bivl.data import decoding
from bivl.evaluators import features

NEEDS = ("text",)  # fields that both splits must have
SHOWN = 3  # examples in the log


def make(predict, splits, config=None):
    """Error rates of predict["log_probs"], as `run(params, extras) -> dict`.

    predict["log_probs"](params, extras, batch) gives natural logarithms [B, T, V] and the valid
    frames [B]; the batch holds `transcript` int32 [B, U], letter ids padded with 0.

    Settings: `letters`, config.letters (LibriSpeech's); `decoder` "greedy" or "beam"; of the beam
    `width` 32, `lm`, the path of an ARPA file or "" for none, and its weights `alpha` 0.5 and
    `beta` 1.0 (see `decoding.beam_search`). Results: `wer` and `cer` of the test split. The first
    examples are logged. Raises UserError for a model with other classes than the letters, and
    where there are no transcripts; GuardStop where a probability is not a number.
    """
    options = features.settings(
        config,
        "wer",
        letters=decoding.LIBRISPEECH,
        decoder="greedy",
        width=32,
        lm="",
        alpha=0.5,
        beta=1.0,
    )
    letters = decoding.Letters(options["letters"])
    decode = _decoder(options, letters)

    def run(params, extras):
        truth, heard = [], []
        for log_probs, lengths, transcripts in _utterances(predict, splits, params, extras):
            if log_probs.shape[-1] != letters.size:
                raise UserError(
                    f"the model has {log_probs.shape[-1]} classes but config.eval.wer.letters="
                    f"{letters.letters!r} makes {letters.size} with blank; give it config.letters"
                )
            truth += [letters.decode(ids) for ids in transcripts]
            pairs = zip(log_probs, lengths, strict=True)
            heard += [letters.decode(decode(rows, int(length))) for rows, length in pairs]
        if not any(truth):
            raise UserError(
                "eval_data.test has no words to compare with; check eval_data.test.fields.text"
            )
        for reference, hypothesis in list(zip(truth, heard, strict=True))[:SHOWN]:
            logging.info("wer: said %r, heard %r", reference, hypothesis)
        return {"wer": float(jiwer.wer(truth, heard)), "cer": float(jiwer.cer(truth, heard))}

    return run


def _decoder(options, letters):
    """The function (log_probs [T, V], frames) -> ids that the settings describe."""
    key = "config.eval.wer"
    if choice("eval.wer.decoder", options["decoder"], ("greedy", "beam")) == "greedy":
        if options["lm"]:
            raise UserError(f"{key}.lm needs the beam; set {key}.decoder=beam")
        return decoding.greedy
    width = features.number(options["width"], f"{key}.width")
    lm = decoding.ArpaLM.read(options["lm"]) if options["lm"] else None
    known = set(letters.letters)
    if lm and not any(known.issuperset(word) for word in lm.vocabulary):
        raise UserError(
            f"no word of {key}.lm={options['lm']} can be spelt with {letters.letters!r}; give a "
            "model in the same case and language"
        )
    weights = {"alpha": float(options["alpha"]), "beta": float(options["beta"])}
    return lambda rows, frames: decoding.beam_search(
        rows, frames, width=width, lm=lm, letters=letters, **weights
    )


def _utterances(predict, splits, params, extras):
    """(log_probs [n, T, V], frames [n], transcripts [n, U]) of the real examples of each batch."""
    if "log_probs" not in predict:
        raise UserError("this objective has no 'log_probs'; take wer out of config.evaluators")
    for batch in splits.batches("test"):
        if "transcript" not in batch:
            raise UserError(
                "eval_data.test has no transcripts; name the feature that holds them in "
                "eval_data.test.fields.text, or take wer out of config.evaluators"
            )
        mask = np.asarray(batch["mask"], bool)
        inputs = features.model_inputs(batch)
        log_probs, lengths = to_host(predict["log_probs"](params, extras, inputs))
        log_probs = log_probs[mask].astype(np.float32)
        if np.isnan(log_probs).any():
            raise GuardStop(
                "the probabilities of eval_data.test are not numbers: the model has diverged; "
                "evaluate an earlier step or lower optimizer.learning_rate"
            )
        yield log_probs, lengths[mask], to_host(batch["transcript"])[mask]
