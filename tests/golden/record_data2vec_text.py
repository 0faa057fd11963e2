"""Records what the PyTorch references compute on text: data2vec_text.npz and data2vec2_text.npz.

    python tests/golden/record_data2vec_text.py

needs torch and numpy. Everything runs in float64; README.md beside this file describes every array.
"""

import functools

import numpy as np
import plain_masks as masks
import recording
import torch
import torch_data2vec2_text as text2
import torch_data2vec_text as text1
import torch_data2vec_vision as vision
import torch_postnorm as parts
from recording import SIZES, TOP_K

WORDS = {"vocabulary": 40, "positions": 26}
MASK_TOKEN = WORDS["vocabulary"] - 1
LENGTHS = (24, 17)  # of the rows of a padded batch
RATES = [vision.cosine(n, 2.0**-8, 0, 8) for n in range(2)]


def make_tokens(rng, lengths):
    """Int [2, 24]: <s>, words, </s>, padding."""
    tokens = torch.as_tensor(rng.integers(4, MASK_TOKEN, (2, 24)))
    tokens[:, 0] = text1.BOS
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1], row[length:] = text1.EOS, text1.PAD
    return tokens


def record_first(rng):
    """data2vec 1.0, on a padded batch."""
    model = text1.Data2VecText(text1.ModelConfig(**SIZES, **WORDS))
    models = student, teacher = recording.make_models(model, rng, text1.kind)
    tokens = make_tokens(rng, LENGTHS)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[:length] = torch.as_tensor(masks.text_spans(rng, length))
    source = tokens.masked_fill(mask, MASK_TOKEN)
    out = {"tokens": tokens, "mask": mask, "source": source}
    out["student/embedded"], *encoded = student.encode(source)
    out |= recording.stacked(*encoded, "student")
    out["prediction"] = student.predict(source, mask)
    losses = {}
    for name, full in (("paper", True), ("shipped", False)):
        given = text1.teacher_tokens(tokens, mask, full)
        normalized, mean, _ = text1.teacher_targets(teacher, tokens, mask, TOP_K, full)
        moments = recording.deviations(mean[mask], out["prediction"])
        more = {"tokens": given, "positions": text1.positions(given)}
        more["embedded"], *encoded = teacher.encode(given)
        more |= {"targets/normalized": normalized, "targets/mean": mean} | moments
        out |= {f"{name}/{key}": value for key, value in more.items()}
        out |= recording.stacked(*encoded, name)
        losses[name] = functools.partial(
            text1.loss, tokens=tokens, source=source, mask=mask, top_k=TOP_K, full=full
        )
    out |= recording.record_training(models, text1.kind, losses, RATES, clip=5.0)
    rate = functools.partial(vision.cosine, peak=2e-4, warmup=10_000)
    return out | recording.record_schedules(1_000_000, rate, (0.999, 0.9999, 300_000))


def record_second(rng):
    """data2vec 2.0: full blocks; and one padded batch through the student."""
    decoder = parts.DecoderConfig(16, 9, 1, 3, residual=False, projections=2)
    model = text2.Data2Vec2Text(text2.ModelConfig(**SIZES, **WORDS, decoder=decoder))
    models = student, teacher = recording.make_models(model, rng, text2.kind)
    tokens, padded = make_tokens(rng, (24, 24)), make_tokens(rng, LENGTHS)
    clones = recording.make_clones(rng, lambda: masks.uniform(rng, 24, 0.48))
    features = student.features(tokens)
    out = {"tokens": tokens, "features": features}
    out |= recording.stacked(*student.encode_kept(features, clones[1]), "student")
    out |= recording.stacked(*teacher.encode(features), "teacher")
    out |= {"padded/tokens": padded, "padded/features": student.features(padded)}
    layers, _ = student.encode(out["padded/features"], padded == text2.PAD)
    out["padded/layers"] = torch.stack(layers)
    norms = parts.layer_norm, parts.instance_norm
    out["targets/large/final"] = text2.teacher_targets(teacher, features, TOP_K, *norms)[2]

    def loss_of(s, t, *rest):
        return text2.loss(s, t, tokens, *rest)

    given = clones[1:2]
    out |= recording.record_clones(models, text2, given, features, clones, loss_of, 1.0, RATES)
    rate = functools.partial(vision.cosine, peak=2e-4, warmup=4000)
    return out | recording.record_schedules(1_000_000, rate, (0.9999, 0.99999, 100_000))


if __name__ == "__main__":
    torch.set_num_threads(1)
    recording.write("data2vec_text", record_first(np.random.default_rng(3)))
    recording.write("data2vec2_text", record_second(np.random.default_rng(4)))
