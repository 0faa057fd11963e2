"""Records what the PyTorch reference computes: data2vec2_vision.npz.

    python tests/golden/record_data2vec2_vision.py

needs torch and numpy. Everything runs in float64 and is stored in float32.

Model: image 32, patch 8, so 4x4 patches, T = 16; D = 32, H = 2, depth 3, K = 2 layers; B = 3, M = 2
masks an example, 5 patches kept. Arrays, `<name>` being fairseq's names:

images [B,32,32,3] normalised; mask [B,M,T] 1 = hidden; keep [B,M,5]; noise [B M,T,D]
params/<name>, teacher_params/<name>   multiples of 1/64; the teacher has no decoder
positions [T,D]                        the fixed table
teacher/layers [4,B,1+T,D], teacher/ffn [3,B,T,D] without CLS, targets [B,T,D]
student/layers [4,B M,6,D]             CLS and kept patches, block 0's input first
prediction/VARIANT [B M,T,D], cls [B M,D], prediction/noisy (decoder "same", with `noise`)
loss/VARIANT, loss/cls                 regression loss by decoder; CLS loss before its weight
grads/<name>                           of loss/same + 1.28 loss/cls, multiples of 2^-26
grads/narrow/<name>                    of loss/narrow, decoder and context norm only

VARIANT is `same` (decoder width 32, kernel 3, so that every layer has its residual) or `narrow`
(16, kernel 5: none in the first layer). All predictions but `noisy` are with noise 0.
"""

import copy
import dataclasses
import pathlib

import numpy as np
import torch
import torch_data2vec2_vision as reference
from record_data2vec_vision import on_grid, save, tree

PATH = pathlib.Path(__file__).with_name("data2vec2_vision.npz")
DECODERS = {
    "same": reference.DecoderConfig(width=32, kernel=3, groups=4, depth=2),
    "narrow": reference.DecoderConfig(width=16, kernel=5, groups=4, depth=2),
}
MODEL = reference.ModelConfig(
    image_size=32, patch_size=8, width=32, depth=3, num_heads=2, decoder=DECODERS["same"]
)
BATCH, CLONES, KEPT, TOP_K, CLS_WEIGHT = 3, 2, 5, 2, 1.28


def trainable(model):
    """(name, parameter) but for the fixed table."""
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


@torch.no_grad()
def randomize(model, rng, old=None):
    """Draws every parameter at a size that shows, as multiples of 1/64; near `old` if given."""
    for name, value in trainable(model):
        noise = rng.standard_normal(value.shape)
        if name.endswith("extra_tokens"):
            drawn = noise
        elif name.endswith("bias"):
            drawn = 0.2 * noise
        elif value.ndim == 1:
            drawn = 1 + 0.3 * noise
        else:
            drawn = noise / np.sqrt(value[0].numel())
        if old is not None:
            drawn = 0.3 * drawn + 0.7 * old[name].numpy()
        value.copy_(torch.as_tensor(on_grid(drawn)))


def variant(student, name, rng):
    """The student with another decoder, randomly filled."""
    config = dataclasses.replace(MODEL, decoder=DECODERS[name])
    model = reference.Data2Vec2Vision(config).double()
    randomize(model, rng)
    kept = {key: x for key, x in student.state_dict().items() if ".decoder." not in key}
    model.load_state_dict(kept, strict=False)
    return model


def gradients(model, loss, keep=lambda name: True):
    """(name, gradient) of the parameters that `keep` accepts."""
    names, values = zip(*[pair for pair in trainable(model) if keep(pair[0])], strict=True)
    return zip(names, torch.autograd.grad(loss, values, retain_graph=True), strict=True)


def main():
    """Writes the file beside this script."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(2)
    student = reference.Data2Vec2Vision(MODEL).double()
    randomize(student, rng)
    teacher = copy.deepcopy(student)
    randomize(teacher, rng, old=student.state_dict())
    narrow = variant(student, "narrow", rng)
    images = torch.as_tensor(on_grid(rng.standard_normal((BATCH, 32, 32, 3)), 2.0**-5))
    order = rng.permuted(np.tile(np.arange(16), (BATCH, CLONES, 1)), axis=-1)
    mask = torch.as_tensor(order >= KEPT)
    noise = torch.as_tensor(on_grid(rng.standard_normal((BATCH * CLONES, 16, 32))))

    layers, ffn = (torch.stack(x).detach().numpy() for x in teacher.encode(images))
    targets = reference.teacher_targets(teacher, images, TOP_K)
    prediction, cls = student.predict(images, mask, torch.zeros_like(noise))
    other, _ = narrow.predict(images, mask, torch.zeros_like(noise))
    regression, cls_loss = reference.losses(prediction, cls, targets, mask)
    narrow_loss, _ = reference.losses(other, cls, targets, mask)
    in_narrow = lambda name: ".decoder." in name or ".context_encoder." in name  # noqa: E731
    teacher_params = [pair for pair in trainable(teacher) if ".decoder." not in pair[0]]
    narrow_params = [pair for pair in trainable(narrow) if ".decoder." in pair[0]]
    arrays = {
        "images": images,
        "mask": mask,
        "keep": np.stack([np.flatnonzero(~m) for m in mask.numpy().reshape(-1, 16)]).reshape(
            BATCH, CLONES, KEPT
        ),
        "noise": noise,
        "positions": reference.sincos(MODEL.grid, MODEL.width)[0],
        "teacher/layers": layers,
        "teacher/ffn": ffn[:, :, 1:],
        "targets": targets,
        "student/layers": torch.stack(student.encode(images, mask)[0]).detach(),
        "prediction/same": prediction.detach(),
        "prediction/narrow": other.detach(),
        "prediction/noisy": student.predict(images, mask, noise)[0].detach(),
        "cls": cls.detach(),
        "loss/same": regression.detach(),
        "loss/narrow": narrow_loss.detach(),
        "loss/cls": cls_loss.detach(),
    }
    arrays |= tree("params", trainable(student)) | tree("teacher_params", teacher_params)
    arrays |= tree("params/narrow", narrow_params)
    total = regression + CLS_WEIGHT * cls_loss
    arrays |= tree("grads", gradients(student, total), 2.0**-26)
    arrays |= tree("grads/narrow", gradients(narrow, narrow_loss, in_narrow), 2.0**-26)
    arrays = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
    save(PATH, arrays)
    print(f"{PATH.name}: {len(arrays)} arrays, {PATH.stat().st_size} bytes")
    print({key: float(value) for key, value in arrays.items() if key.startswith("loss")})


if __name__ == "__main__":
    main()
