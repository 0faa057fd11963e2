"""Times a training step beside the same step in PyTorch, in turns, in one process, on the CPU.

    taskset -c 0 python launch/against_pytorch.py --config=FILE[:options] [--config.a=v] [--json]

For configs of data2vec and data2vec 2.0 on images and of BEiT-3 (masked data modeling) on pairs.
Both take the same batch, the first of the config's own data, with the same masks, sizes, dropout
and optimizer, in float32: targets by the teacher, the student forward and backward, clipping,
AdamW, the teacher's move. PyTorch's models are those of tests/golden, to which ours are equal,
with its fused attention (where no bias is learned), fused AdamW and `torch._foreach` EMA.

Each has as many threads as the process may use cores, so that `taskset` says how many. Steps
alternate, which spreads whatever else the machine does over both; the ratio is the median of ours
over PyTorch's step just before, so that below 1 ours is quicker.
"""

import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bivl import train
from bivl.core import cli, memory, sharding
from bivl.core import config as configs
from bivl.core import state as states
from bivl.core.errors import UserError
from bivl.data import tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
import torch_beit3  # noqa: E402
import torch_data2vec2_vision as torch_data2vec2  # noqa: E402
import torch_data2vec_vision as torch_data2vec  # noqa: E402
import torch_vqkd  # noqa: E402

THREADS = len(os.sched_getaffinity(0))
FLAGS = {
    "--steps": {"type": int, "default": 10, "help": "steps of each to time, after 2 to warm up"},
    "--json": {"action": "store_true", "help": "one JSON object on standard output"},
}
BARE = {"drop_path": 0.0, "attention_dropout": 0.0, "dropout": 0.0}  # where it has none


def ours(config):
    """-> (function that runs one step, its batch as numpy arrays)."""
    program = train.build(config)
    with sharding.use(program.mesh):
        state = states.create(program.objective, program.tx, program.mesh, config.seed)
        compiled = program.compile()
        batches = train.open_batches(config, program, 0)
        host, _ = next(batches)
        batches.close()
        batch = sharding.to_global(host, program.mesh, program.sizes)

    def step(n: int):
        nonlocal state
        state, values = compiled(state, batch, np.int32(n))
        return float(values["loss"])

    return step, host


def normalized(images, config):
    """uint8 [B, S, S, 3] as the student sees it."""
    mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    return (images / 255 - mean) / std


def refuse(config, wanted: dict) -> None:
    """UserError unless config.model has what the reference has alone."""
    for name, value in wanted.items():
        if config.model[name] != value:
            raise UserError(
                f"config.model.{name}={config.model[name]!r}: PyTorch's reference has but "
                f"{value!r}; add --config.model.{name}={value}"
            )


def sizes(config, *names):
    """The fields of a reference's ModelConfig that a config holds."""
    known = config.model.to_dict() | {"image_size": config.image_size}
    return {name: known[name] for name in ("image_size", "patch_size", "width", *names)}


def data2vec(config, batch):
    """-> (student, function that gives its loss, teacher that follows it)."""
    names = ("depth", "num_heads", "mlp_dim", "layer_scale", "drop_path", "attention_dropout")
    model = torch_data2vec.Data2VecVision(torch_data2vec.ModelConfig(**sizes(config, *names)))
    teacher = copy.deepcopy(model).eval()
    settings = torch_data2vec.TargetConfig(config.top_k_layers)

    def loss():
        images = normalized(batch["image"], config)
        target = torch_data2vec.teacher_targets(teacher, images, settings)[batch["mask"]]
        prediction = model.predict(images, batch["mask"], masked_only=True)
        return torch_data2vec.regression_loss(prediction, target, config.loss.beta)

    return model, loss, teacher


def data2vec2(config, batch):
    """As `data2vec`."""
    refuse(config, BARE)
    c = config.decoder
    decoder = torch_data2vec2.DecoderConfig(c.width, c.kernel, c.groups, c.depth)
    settings = sizes(config, "depth", "num_heads")
    model = torch_data2vec2.ModelConfig(**settings, decoder=decoder)
    model = torch_data2vec2.Data2Vec2Vision(model).float()
    teacher = copy.deepcopy(model).eval()
    clones = (-1, *batch["mask"].shape[2:])
    mask, keep = batch["mask"].view(clones), batch["keep"].long()

    def loss():
        images = normalized(batch["image"], config)
        targets = torch_data2vec2.teacher_targets(teacher, images, config.top_k_layers)
        x, cls = student(model, images, keep)
        full = c.noise * torch.randn(*mask.shape, x.shape[-1])
        full = full.masked_scatter(~mask[..., None], x)
        prediction = model.modality_encoders["IMAGE"].decoder(full)
        regression, classes = torch_data2vec2.losses(prediction, cls, targets, batch["mask"])
        return regression + config.loss.cls_weight * classes

    def student(model, images, keep):
        """The kept tokens alone, [B M, K, D] and CLS [B M, D]; one gather for all clones."""
        front = model.modality_encoders["IMAGE"]
        x = front.local_encoder["proj"](images.movedim(-1, 1)).flatten(2).mT
        x = x + front.fixed_positional_encoder["positions"]
        index = keep.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
        x = x.gather(1, index).view(-1, keep.shape[-1], x.shape[-1])
        x = torch.cat([front.extra_tokens.expand(len(x), -1, -1), x], 1)
        x = front.context_encoder["norm"](x)
        for block in model.blocks:
            x, _ = block(x)
        return x[:, 1:], x[:, 0]

    return model, loss, teacher


def mdm(config, batch):
    """As `data2vec`; the frozen tokenizer does not move, so that there is no teacher."""
    refuse(config, BARE)
    batch, theirs = batch["pairs"], config.teacher.config
    words = tokenizers.load(config.tokenizer)
    count = config.model.vocabulary or words.size
    model = torch_beit3.BEiT3(
        torch_beit3.ModelConfig(
            **sizes(config, "depth", "num_heads", "mlp_dim"),
            vocabulary=count,
            positions=config.model.text_rows,
        )
    )
    heads = {"image": nn.Linear(config.model.width, theirs.codebook.size)}
    model.heads = nn.ModuleDict(heads | {"text": nn.Linear(config.model.width, count)})
    codes_of = tokenizer(theirs)
    inputs, tokens = batch["inputs"].long(), batch["tokens"].long()
    padding, patches = tokens == words.pad, batch["mask"].shape[1]

    def loss():
        codes = codes_of(batch["image"])
        images = normalized(batch["image"], config).movedim(-1, 1)
        _, x = model(images, inputs, padding, batch["mask"])
        places = {"image": (x[:, 1 : 1 + patches], batch["mask"], codes)}
        places["text"] = (x[:, 1 + patches :], batch["text_mask"], tokens)
        return sum(
            F.cross_entropy(model.heads[name](x[mask]), classes[mask])
            for name, (x, mask, classes) in places.items()
        )

    return model, loss, None


def tokenizer(config):
    """-> function from uint8 images [B, S, S, 3] to codes int [B, T]."""
    settings = torch_data2vec.ModelConfig(**sizes(config, "depth", "num_heads", "mlp_dim"))
    width, book = config.model.width, config.codebook
    encoder = torch_vqkd.PatchModel(
        settings, 3, settings.patch_size, settings.depth, settings.grid**2
    )
    last = torch_vqkd.task_layer(width, book.width)
    codebook = F.normalize(torch.randn(book.size, book.width), dim=-1)

    @torch.no_grad()
    def codes(images):
        x = encoder(images.movedim(-1, 1) / 127.5 - 1)
        return (F.normalize(last(x), dim=-1) @ codebook.T).argmax(-1)

    return codes


def stand_in(config) -> None:
    """Gives a config of BEiT-3 that names no tokenizer a random one, of the student's own size."""
    if config.get("teacher") is None or config.teacher.checkpoint or config.teacher.config:
        return
    theirs = configs.load("configs/pretrain/vqkd.py:smoke")
    names = ("width", "depth", "num_heads", "mlp_dim", "patch_size")
    theirs.model.update({name: config.model[name] for name in names})
    theirs.codebook.update({"size": 64, "width": 32})
    theirs.image_size = theirs.teacher.config.image_size = config.image_size
    theirs.teacher.config.model.patch_size = config.model.patch_size
    with config.unlocked():
        config.teacher.update({"random": True, "config": theirs.to_dict()})


MODELS = {"data2vec": data2vec, "data2vec2": data2vec2, "mdm": mdm}


def attend(q, k, v, heads: int, bias=None):
    """PyTorch's fused attention of [B, L, D], where the references spell it out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class Attention(torch_data2vec2.Attention):
    """data2vec 2.0's."""

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, -1), self.num_heads))


class MultiwayAttention(torch_beit3.Attention):
    """BEiT-3's."""

    def forward(self, x, split, bias):
        parts = (maps(x, split) for maps in (self.q_proj, self.k_proj, self.v_proj))
        y = attend(*parts, self.heads, bias)
        return self.out_proj(self.inner_attn_ln(y, split), split)


torch_data2vec2.Attention, torch_beit3.Attention = Attention, MultiwayAttention


def theirs(config, batch):
    """-> function that runs one step in PyTorch on the batch of ours."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(THREADS)
    student, loss, teacher = MODELS[config.objective](config, as_tensors(batch))
    o, decayed = config.optimizer, {True: [], False: []}
    params = [p for p in student.parameters() if p.requires_grad]
    for value in params:
        decayed[value.ndim > 1].append(value)
    groups = [
        {"params": group, "weight_decay": o.weight_decay * decays}
        for decays, group in decayed.items()
    ]
    options = {"lr": o.learning_rate, "betas": (o.beta1, o.beta2), "eps": o.eps}
    adam = torch.optim.AdamW(groups, fused=True, **options)
    rate = 1 - config.get("ema_decay_start", 1.0)

    def step(n: int):
        del n
        value = loss()
        adam.zero_grad(set_to_none=True)
        value.backward()
        if o.clip_norm:
            nn.utils.clip_grad_norm_(params, o.clip_norm)
        adam.step()
        if teacher is not None:
            with torch.no_grad():
                pairs = teacher.parameters(), student.parameters()
                torch._foreach_lerp_(*map(list, pairs), rate)
        return value.item()

    return step


def as_tensors(tree):
    """Nested dicts of arrays -> of tensors."""
    return {
        name: as_tensors(x) if isinstance(x, dict) else torch.from_numpy(np.array(x))
        for name, x in tree.items()
    }


def measure(config, num_steps: int) -> dict:
    """Seconds a step of both, and their ratio."""
    if config.objective not in MODELS:
        raise UserError(f"config.objective={config.objective!r}: choose from {', '.join(MODELS)}")
    stand_in(config)
    memory.keep()
    first, batch = ours(config)
    sides = {"bivl": first, "pytorch": theirs(config, batch)}
    walls, cpus = ({name: [] for name in sides} for _ in range(2))
    for n in range(1, num_steps + 3):
        for name, step in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step(n)
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)

    def ratio(times):
        pairs = zip(times["bivl"][2:], times["pytorch"][2:], strict=True)
        return statistics.median(a / b for a, b in pairs)

    report = {"threads": THREADS, "batch_size": config.batch_size, "steps": num_steps}
    for name in sides:
        report[f"{name}_seconds"] = min(walls[name][2:])
        report[f"{name}_cpu_seconds"] = min(cpus[name][2:])
    return report | {"ratio": ratio(walls), "cpu_ratio": ratio(cpus), "load": os.getloadavg()[0]}


def main(argv) -> None:
    """The command line."""
    args, config = cli.parse(argv, __doc__, FLAGS)
    report = measure(config, max(args.steps, 1))
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:24} {value:.4g}")


if __name__ == "__main__":
    cli.run(main)
