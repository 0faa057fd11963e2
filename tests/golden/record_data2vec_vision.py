"""Records what the PyTorch reference computes: data2vec_vision.npz and init_data2vec_vision.json.

    python tests/golden/record_data2vec_vision.py

needs torch and numpy. Everything runs in float64 and is stored in float32; README.md beside this
file describes every array.
"""

import copy
import dataclasses
import io
import json
import pathlib
import zipfile

import numpy as np
import torch
import torch_data2vec_vision as reference

FOLDER = pathlib.Path(__file__).parent
MODEL = reference.ModelConfig(
    image_size=32, patch_size=8, width=32, depth=3, num_heads=2, mlp_dim=128
)
MASKED = (10, 9, 7, 11)  # masked patches of each image, of 16
TARGETS = {  # name of a recorded array -> flags that are on
    "dv": ["layer_norm", "final_layer_norm"],
    "mean": [],
    "ln": ["layer_norm"],
    "in": ["instance_norm"],
    "bn": ["batch_norm"],
    "gn": ["group_norm"],
    "final_in": ["final_instance_norm"],
    "in_final_ln": ["instance_norm", "final_layer_norm"],
    "bn_in_ln": ["batch_norm", "instance_norm", "layer_norm"],
    "final_ln_in": ["final_layer_norm", "final_instance_norm"],
    "all": [f.name for f in dataclasses.fields(reference.TargetConfig) if f.type is bool],
    "ffn_in_final_ln": ["instance_norm", "final_layer_norm"],
}
STEP = reference.StepConfig(  # powers of two where they keep the recorded numbers short
    learning_rate=2.0**-8,
    min_learning_rate=1e-5,
    total_steps=8,
    clip_norm=0.8,  # 3.0 would be idle at this size: here it cuts the first steps, not the third
    ema_decay_start=0.5,
    ema_decay_end=0.875,
    ema_anneal_steps=4,
)
WEIGHT_DECAY = 0.5  # ten times the recipe's, so that a wrong list of decayed parameters shows


def target_config(name):
    """The named pipeline: the last two layers, and no flags but the listed ones."""
    flags = {f.name: f.name in TARGETS[name] for f in dataclasses.fields(reference.TargetConfig)}
    flags |= {"top_k": 2, "collect": "ffn" if name.startswith("ffn") else "end"}
    return reference.TargetConfig(**flags)


def on_grid(values, step=2.0**-6):
    """Rounds to multiples of `step`: exact in float32, and small once compressed."""
    return np.round(values / step) * step


def random_parameters(model, rng):
    """Draws every parameter at a size that makes its effect visible."""
    sizes = {"bias": 0.2, "gamma": 0.5, "table": 0.5, "token": 0.5, "norm": 0.3}
    drawn = {}
    for name, value in model.named_parameters():
        noise = rng.standard_normal(value.shape)
        kind = next((kind for kind in ("bias_table", "token", "gamma") if kind in name), None)
        if kind:
            drawn[name] = sizes[kind.removeprefix("bias_")] * noise
        elif name.endswith("bias"):
            drawn[name] = sizes["bias"] * noise
        elif value.ndim == 1:
            drawn[name] = 1 + sizes["norm"] * noise
        else:
            drawn[name] = noise / np.sqrt(value[0].numel())
    return drawn


def load(model, parameters):
    """Writes a dict of arrays into the model."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.as_tensor(parameters[name]))


def make_inputs(rng):
    """Student, teacher, images [B, h, w, 3] and mask [B, T]; parameters multiples of 1/64."""
    student = reference.Data2VecVision(MODEL).double()
    teacher = copy.deepcopy(student)
    parameters = random_parameters(student, rng)
    load(student, {name: on_grid(value) for name, value in parameters.items()})
    noise = random_parameters(teacher, rng)
    moved = {name: on_grid(parameters[name] + 0.25 * noise[name]) for name in parameters}
    load(teacher, moved)
    shape = (len(MASKED), MODEL.image_size, MODEL.image_size, 3)
    images = on_grid(rng.standard_normal(shape), 2.0**-5)
    mask = np.stack([rng.permutation(MODEL.grid**2) < count for count in MASKED])
    return student, teacher, torch.as_tensor(images), torch.as_tensor(mask)


def tree(prefix, named, step=None):
    """`prefix/name` -> array for (name, tensor) pairs, rounded to multiples of `step` if given."""
    arrays = {f"{prefix}/{name}": value.detach().numpy() for name, value in named}
    return {key: on_grid(value, step) for key, value in arrays.items()} if step else arrays


def record_forward(student, teacher, images, mask):
    """Teacher layers, targets, predictions."""
    with torch.no_grad():
        layers, ffn = teacher.encode(images)
        out = {
            "teacher/layers": torch.stack(layers).numpy(),
            "teacher/ffn": torch.stack(ffn).numpy()[:, :, 1:],
            "teacher/tokens": teacher.norm(layers[-1]).numpy(),
            "student/layers": torch.stack(student.encode(images, mask)[0]).numpy(),
            "student/prediction": student.predict(images, mask).numpy(),
        }
    for name in TARGETS:
        targets = reference.teacher_targets(teacher, images, target_config(name))
        out[f"targets/{name}"] = targets.numpy()
    return out


def record_losses(student, teacher, images, mask):
    """Losses in both normalisations, all gradients of one, gradient norms of all."""
    target = reference.teacher_targets(teacher, images, target_config("dv"))[mask]
    prediction = student.predict(images, mask, masked_only=True)
    out = {
        "target_std": reference.mean_std(target).item(),
        "prediction_std": reference.mean_std(prediction).item(),
    }
    for kind, scale in (("mean", None), ("sum", MODEL.width**-0.5)):
        for beta in (0.0, 2.0):
            loss = reference.regression_loss(prediction, target, beta, scale)
            names, values = zip(*student.named_parameters(), strict=True)
            grads = torch.autograd.grad(loss, values, retain_graph=True)
            key = f"{kind}_beta{beta:.0f}"
            out[f"loss/{key}"] = loss.item()
            out[f"grad_norms/{key}"] = np.array([grad.norm().item() for grad in grads])
            if key == "mean_beta2":
                out |= tree("grads", zip(names, grads, strict=True), 2.0**-26)
    return out


def record_steps(inputs, number, warmup):
    """Parameters, teacher and the numbers logged after `number` full steps on the same batch."""
    student, teacher = copy.deepcopy(inputs[:2])
    optimizer = reference.make_optimizer(student, WEIGHT_DECAY)
    config = dataclasses.replace(STEP, targets=target_config("dv"), warmup_steps=warmup)
    logged = [
        reference.step(student, teacher, optimizer, *inputs[2:], config, done)
        for done in range(number)
    ]
    out = {f"step{number}/{key}": np.array([line[key] for line in logged]) for key in logged[0]}
    for kind, model in (("params", student), ("teacher", teacher)):
        out |= tree(f"step{number}/{kind}", model.named_parameters(), 2.0**-20)
    return out


def record_rules(model):
    """Parameter names in order, which are decayed, and rate factors of layer decay 0.65."""
    named = list(model.named_parameters())
    factors = [reference.rate_factor(name, MODEL.depth, 0.65) for name, _ in named]
    return {
        "names": np.array([name for name, _ in named]),
        "weight_decay_mask": np.array([reference.is_decayed(*pair) for pair in named]),
        "rate_factors": np.array(factors),
        "relative_position_index/4x4": reference.relative_position_index(4, 4).numpy(),
        "relative_position_index/2x3": reference.relative_position_index(2, 3).numpy(),
    }


def record_schedules():
    """Values at n = 0..119 of rates with 100 updates in all, and of the teacher's decay."""
    rates = {
        "cosine": lambda n: reference.cosine(n, 2e-3, 10, 100, 1e-5),
        "cosine_early_peak": lambda n: reference.cosine(n, 2e-3, 10, 100, 1e-5, early_peak=True),
        "cosine_no_floor": lambda n: reference.cosine(n, 2e-3, 10, 100),
        "tri_stage": lambda n: reference.tri_stage(n, 5e-4, (0.03, 0.9, 0.07), 100),
        "tri_stage_ctc": lambda n: reference.tri_stage(n, 3e-5, (0.1, 0.4, 0.5), 100, 0.01, 0.05),
        "polynomial": lambda n: reference.polynomial(n, 1e-5, 6, 100),
        "ema_linear": lambda n: reference.ema_decay(n, 0.999, 0.9999, 100),
        "ema_to_one": lambda n: reference.ema_decay(n, 0.9997, 1.0, 100),
        "ema_constant": lambda n: reference.ema_decay(n, 0.9998, 0.9998, 0),
    }
    return {
        f"schedule/{name}": np.array([rule(n) for n in range(120)]) for name, rule in rates.items()
    }


def init_statistics(seeds=8):
    """Statistics of fresh parameters at width 64, depth 4: means over seeds, extremes over all."""
    config = reference.ModelConfig(
        image_size=32, patch_size=8, width=64, depth=4, num_heads=4, mlp_dim=256
    )
    drawn = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, value in reference.Data2VecVision(config).named_parameters():
            drawn.setdefault(name, []).append(value.detach().double().numpy())
    parameters = {
        name: {
            "shape": list(values[0].shape),
            "mean": float(np.mean(values)),
            "std": float(np.mean([value.std() for value in values])),
            "min": float(np.min(values)),
            "max": float(np.max(values)),
        }
        for name, values in drawn.items()
    }
    return {
        "config": dataclasses.asdict(config),
        "seeds": seeds,
        "cut_normal_std": 0.02 * 0.539560,  # a normal cut at one deviation
        "depth_rescale": [(2 * layer) ** -0.5 for layer in range(1, config.depth + 1)],
        "parameters": parameters,
    }


def save(path, arrays):
    """An .npz packed with LZMA (np.load reads it; a tenth smaller than savez_compressed's)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for key, value in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, value, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{key}.npy")  # its fixed date makes the file reproducible
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, buffer.getvalue())


def main():
    """Writes both files beside this script."""
    torch.set_num_threads(1)
    inputs = make_inputs(np.random.default_rng(0))
    student, teacher, images, mask = inputs
    arrays = {"images": images.numpy(), "mask": mask.numpy()}
    arrays |= tree("params", student.named_parameters())
    arrays |= tree("teacher_params", teacher.named_parameters())
    arrays |= record_forward(*inputs) | record_losses(*inputs)
    arrays |= record_steps(inputs, 1, warmup=0) | record_steps(inputs, 3, warmup=2)
    arrays |= record_rules(student) | record_schedules()
    arrays = {
        key: value if key == "names" else np.asarray(value, np.float32)
        for key, value in arrays.items()
    }
    path = FOLDER / "data2vec_vision.npz"
    save(path, arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size} bytes")
    for key in ("grad_norm", "loss", "learning_rate", "ema_decay"):
        print(key, arrays[f"step1/{key}"], arrays[f"step3/{key}"])
    text = json.dumps(init_statistics(), indent=1)
    (FOLDER / "init_data2vec_vision.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
