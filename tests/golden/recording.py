"""What the recorders of data2vec on text and audio share. Needs torch."""

import copy
from pathlib import Path

import numpy as np
import sequence_files as files
import torch
import torch_data2vec_vision as vision
import torch_postnorm as parts
from record_data2vec_vision import on_grid, save

SIZES = {"width": 32, "depth": 3, "num_heads": 4, "mlp_dim": 64}
CLONES, TOP_K = 3, 2
DECAYS = (None, 0.59375, 0.6875)  # of the teacher; the recipes' would not show in two steps
UPDATES = {  # of the recorded schedules, by the number of all updates
    400_000: (0, 1, 10, 4000, 10000, 12000, 30000, 75000, 200000, 372000, 380000, 400000),
    1_000_000: (0, 1, 10, 4000, 10000, 12000, 100000, 300000, 500000, 900000, 999999, 1000000),
}
PADDING = 1


@torch.no_grad()
def randomize(model, rng):
    """Draws every parameter at a size that shows, as multiples of 1/64; padding rows are 0."""
    for name, value in model.named_parameters():
        noise = rng.standard_normal(value.shape)
        if name.endswith("alibi_scale"):
            drawn = np.reshape([1.0, 0.5, -0.25, 2.0], value.shape)
        elif "embed_" in name or name == "mask_emb":
            drawn = 0.5 * noise
        elif name.endswith("bias"):
            drawn = 0.2 * noise
        elif value.ndim == 1:
            drawn = 1 + 0.3 * noise
        else:
            drawn = noise / np.sqrt(value[0].numel())
        value.copy_(torch.as_tensor(on_grid(drawn)))
        if "embed_" in name:
            value[PADDING] = 0.0


@torch.no_grad()
def make_models(model, rng, kind):
    """(student, teacher): averaged parts of the teacher differ, the others are the student's."""
    student = model.double()
    randomize(student, rng)
    other, teacher = copy.deepcopy(student), copy.deepcopy(student)
    randomize(other, rng)
    far = dict(other.named_parameters())
    for name, value in teacher.named_parameters():
        if name.endswith("alibi_scale"):
            value.copy_(torch.tensor([1.25, -0.125, 0.75, 1.5]).view(value.shape))
        elif kind(name) == "averaged":
            value.copy_(torch.as_tensor(on_grid((0.7 * value + 0.3 * far[name]).numpy())))
    return student, teacher


def stacked(layers, ffn, prefix):
    """`prefix/layers` and `prefix/ffn`."""
    return {f"{prefix}/layers": torch.stack(layers), f"{prefix}/ffn": torch.stack(ffn)}


def deviations(target, prediction):
    """The logged mean deviation over masked places of targets and predictions [n, D]."""
    pair = {"target_std": target, "prediction_std": prediction}
    return {name: vision.mean_std(value) for name, value in pair.items()}


def record_training(models, kind, losses, rates, clip):
    """Parameters, gradients and two steps by the first of `losses`, numbers by all of them."""
    shapes = {name: tuple(value.shape) for name, value in models[0].named_parameters()}
    names = np.array(list(shapes))
    out = {"names": names, "shapes": np.array([" ".join(map(str, shapes[n])) for n in names])}
    out |= {"step/learning_rate": rates, "step/ema_decay": DECAYS[1:]}
    first, groups = next(iter(losses)), models
    for name, loss_of in losses.items():
        loss, (new, old) = loss_of(*models), copy.deepcopy(models)
        values, norms = parts.train(new, old, loss_of, kind, rates, DECAYS, clip)
        out |= {f"loss/{name}": loss, f"step/{name}/loss": values}
        out[f"step/{name}/grad_norm"] = norms
        if name == first:
            gradients = torch.autograd.grad(loss, list(models[0].parameters()))
            groups = (*models, new, old)

    def named(model, keep=lambda name: True):
        pairs = model.named_parameters()
        return {name: value.detach().numpy() for name, value in pairs if keep(name)}

    def group(number, values, step, bits=None):
        return files.pack(files.GROUPS[number], values, shapes, bits, step)

    out |= group(0, named(groups[0]), 2.0**-6)
    out |= group(1, named(groups[1], kind), 2.0**-6)
    out |= group(2, dict(zip(names, gradients, strict=True)), 2.0**-30, bits=11)
    out |= group(3, named(groups[2]), 2.0**-18)
    return out | group(4, named(groups[3], kind), 2.0**-18)


def record_clones(models, module, given, features, clones, loss_of, clip, rates):
    """What 2.0 has in both modalities: predictions and losses with and without noise, steps.

    `given`: what `predict` takes between features and noise.
    """
    mask, keep, noise = clones
    fillings = {"calm": torch.zeros_like(noise), "noisy": noise}
    out = {"mask": mask, "keep": keep, "noise": noise}
    losses = {}
    for name, filling in fillings.items():
        out[f"prediction/{name}"] = models[0].predict(features, *given, filling)
        losses[name] = lambda s, t, f=filling: loss_of(s, t, mask, keep, f, TOP_K)
    normalized, mean, _ = module.teacher_targets(models[1], features, TOP_K)
    hidden = mask.flatten(0, 1)
    target = mean.repeat_interleave(CLONES, 0)[hidden]
    out |= deviations(target, out["prediction/calm"][hidden])
    out |= {"targets/normalized": normalized, "targets/mean": mean}
    return out | record_training(models, module.kind, losses, rates, clip)


def make_clones(rng, hide):
    """Mask bool [2, M, T], keep int [2, M, K] (ascending), noise [2 M, T, 32]; hide() a row."""
    mask = np.stack([[hide() for _ in range(CLONES)] for _ in range(2)])
    keep = np.array([[np.flatnonzero(~row) for row in rows] for rows in mask])
    noise = on_grid(0.25 * rng.standard_normal((2 * CLONES, mask.shape[-1], SIZES["width"])))
    return tuple(torch.as_tensor(x) for x in (mask, keep, noise))


def record_schedules(total, rate, decay):
    """The recipe's rate and teacher's decay at some update numbers."""
    updates = UPDATES[total]
    return {
        "schedule/update": np.array(updates),
        "schedule/learning_rate": [rate(n, total=total) for n in updates],
        "schedule/ema_decay": [vision.ema_decay(n, *decay) for n in updates],
    }


def stored(key, value):
    """A tensor, list or number as it is stored: float32 but for schedules; large arrays rounded."""
    array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind == "f" and not key.startswith("schedule/"):
        large = array.size > 64 and not key.endswith("/scale")
        return (on_grid(array, 2.0**-18) if large else array).astype(np.float32)
    return array.astype(np.int32) if array.dtype == np.int64 else array


def write(name, arrays):
    """`<name>.npz` beside this file, and its numbers on the screen."""
    path = Path(__file__).with_name(f"{name}.npz")
    arrays = {key: stored(key, value) for key, value in arrays.items()}
    save(path, arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size} bytes")
    for key, value in arrays.items():
        if key.startswith(("loss/", "step/")) or key.endswith("_std"):
            print(f"  {key}", value)
