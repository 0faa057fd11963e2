"""Records what the PyTorch references compute on audio: data2vec_audio.npz, data2vec2_audio.npz.

    python tests/golden/record_data2vec_audio.py

needs torch and numpy. Everything runs in float64; README.md beside this file describes every array.
"""

import functools

import numpy as np
import plain_masks as masks
import recording
import torch
import torch_data2vec2_audio as audio2
import torch_data2vec_audio as audio1
import torch_data2vec_vision as vision
import torch_postnorm as parts
from recording import SIZES, TOP_K

SOUND = {"channels": 8, "position_groups": 4}
SAMPLES = (5333, 4105)  # of the rows of a padded batch: 16 and 12 frames
PHASES = (0.03, 0.9, 0.07)
TRI_STAGE = [vision.tri_stage(n, 2.0**-6, PHASES, 100) for n in range(2)]
COSINE = [vision.cosine(n, 2.0**-8, 0, 8) for n in range(2)]


def make_raw(rng):
    """Sound [2, S] that is neither centred nor of unit size, as multiples of 1/16."""
    drawn = 0.5 * rng.standard_normal((2, SAMPLES[0])) + 0.125
    return torch.as_tensor(recording.on_grid(drawn, 2.0**-4))


def padded_batch(raw):
    """Normalised waveforms [2, S], each over its own samples, then zeros; padding bool [2, T]."""
    waveforms = torch.zeros_like(raw)
    for row, samples, out in zip(raw, SAMPLES, waveforms, strict=True):
        out[:samples] = parts.normalize(row[:samples])
    number = torch.tensor([[parts.frames(samples)] for samples in SAMPLES])
    return waveforms, torch.arange(parts.frames(SAMPLES[0])) >= number


def record_first(rng):
    """data2vec 1.0: a padded batch, and the same cropped to the shorter row."""
    model = audio1.Data2VecAudio(audio1.ModelConfig(**SIZES, **SOUND))
    models = student, teacher = recording.make_models(model, rng, audio1.kind)
    raw = make_raw(rng)
    waveforms, padding = padded_batch(raw)
    mask = torch.zeros(padding.shape, dtype=torch.bool)
    mask[0, 2:8] = mask[1, [1, 2, 3, 4, 8, 9]] = True
    out = {"raw": raw, "lengths": np.array(SAMPLES), "padding": padding, "mask": mask}
    extracted, features = student.features(waveforms)
    out |= {"extracted": extracted, "features": features}
    for name, model, hidden in (("student", student, mask), ("teacher", teacher, None)):
        out[f"{name}/positions"], *encoded = model.encode(features, hidden, padding)
        out |= recording.stacked(*encoded, name)
    out["prediction"] = student.predict(features, mask, padding)
    stages = audio1.teacher_targets(teacher, features, TOP_K, padding, parts.layer_norm)
    names = ("targets/normalized", "targets/mean", "targets/audioset/final")
    out |= dict(zip(names, stages, strict=True))
    out |= recording.deviations(stages[1][mask], out["prediction"])

    cropped = parts.normalize(raw[:, : SAMPLES[1]])
    cut, features = mask[:, : parts.frames(SAMPLES[1])], student.features(cropped)[1]
    out["cropped/features"] = features
    out["cropped/targets/mean"] = audio1.teacher_targets(teacher, features, TOP_K)[1]
    out["cropped/prediction"] = student.predict(features, cut)
    losses = {
        "cropped": lambda s, t: audio1.loss(s, t, cropped, cut, TOP_K),
        "padded": lambda s, t: audio1.loss(s, t, waveforms, mask, TOP_K, padding),
    }
    out |= recording.record_training(models, audio1.kind, losses, TRI_STAGE, clip=None)
    rate = functools.partial(vision.tri_stage, peak=5e-4, phases=PHASES)
    return out | recording.record_schedules(400_000, rate, (0.999, 0.9999, 30_000))


def record_second(rng):
    """data2vec 2.0, without padding."""
    config = audio2.ModelConfig(**SIZES, **SOUND, decoder=parts.DecoderConfig(16, 7, 4, 3))
    model = audio2.Data2Vec2Audio(config)
    models = student, teacher = recording.make_models(model, rng, audio2.kind)
    raw = make_raw(rng)
    waveforms, length = parts.normalize(raw), parts.frames(SAMPLES[0])
    clones = mask, keep, _ = recording.make_clones(
        rng, lambda: masks.block_line(rng, length, 0.5, 0.05, 5, inverse=False)[0]
    )
    extracted, features = student.features(waveforms)
    out = {"raw": raw, "extracted": extracted, "features": features}
    out["student/positions"], *encoded = student.encode(features, mask, keep)
    out |= recording.stacked(*encoded, "student")
    out["teacher/positions"], *encoded = teacher.encode(features)
    out |= recording.stacked(*encoded, "teacher")
    out |= {f"alibi/slopes{heads}": audio2.slopes(heads) for heads in (4, 12, 16)}
    out["alibi/full"] = student.front.bias(length)[0]
    out["alibi/kept"] = student.front.bias(length, keep.flatten(0, 1))
    out["alibi/teacher"] = teacher.front.bias(length)[0]

    def loss_of(s, t, *rest):
        return audio2.loss(s, t, waveforms, *rest)

    given = mask, keep
    out |= recording.record_clones(models, audio2, given, features, clones, loss_of, None, COSINE)
    rate = functools.partial(vision.cosine, peak=7.5e-4, warmup=8000)
    return out | recording.record_schedules(400_000, rate, (0.999, 0.99999, 75_000))


if __name__ == "__main__":
    torch.set_num_threads(1)
    recording.write("data2vec_audio", record_first(np.random.default_rng(5)))
    recording.write("data2vec2_audio", record_second(np.random.default_rng(6)))
