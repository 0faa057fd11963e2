"""Small training runs and what they leave behind, for the tests of the programs."""

import json

import jax
import numpy as np

COMMON = {
    "model.width": "32",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.mlp_dim": "64",
    "batch_size": "8",
    "evaluators": "",
    "steps": "4",
}
SHALLOW = {"model.depth": "1", "top_k_layers": "1"}  # where every process traces and compiles
SMALL = COMMON | {"image_size": "32", "data.image_size": "32"}
DECODER = {"decoder.width": "16", "decoder.depth": "1", "top_k_layers": "2"}
TEXT = COMMON | {"text.length": "32", "top_k_layers": "2"}
SPEECH = COMMON | {"audio.length": "8000", "model.extractor.width": "16", "top_k_layers": "2"}
FROZEN = {
    "image_size": "32",
    "model.width": "16",
    "model.depth": "1",
    "model.num_heads": "2",
    "model.mlp_dim": "32",
}
TEACHER = {f"teacher.config.{key}": value for key, value in FROZEN.items()}
TOKENIZER = TEACHER | {f"teacher.config.{key}": value for key, value in TEACHER.items()}
TOKENIZER |= {
    "teacher.config.codebook.size": "32",
    "teacher.config.teacher.config.top_k_layers": "1",
}
PAIRS = {"pair.length": "16", "model.text_rows": "40"}
STREAMS = COMMON | PAIRS | {"image_size": "32", "batch_size": "24", "text.length": "32"}
STREAMS |= {"model.depth": "1"}  # an encoder runs five times in an update
STREAMS |= {"data.images.image_size": "32", "data.pairs.image_size": "32"}
TOWER = {f"model.text.{key}": COMMON[f"model.{key}"] for key in ("width", "num_heads", "mlp_dim")}
TOWER |= {"model.text.depth": "1", "pair.length": "16"}
MAPS = {key: value for key, value in SMALL.items() if not key.startswith("model.")}
MAPS |= {"model.widths": "(32, 32)", "model.stem": "8"} | {
    f"model.{key}": "(1, 1)" for key in ("repeats", "kernels", "strides", "expansions")
}
FINETUNE = ("contrastive", "vqa", "nlvr2", "beit3_image", "glue", "ctc")  # the configs that tune
PRETRAIN = {  # the objectives of pre-training by their configs, and what makes these small
    "data2vec_image": SMALL,
    "data2vec_text": TEXT,
    "data2vec_speech": SPEECH,
    "data2vec2_image": SMALL | DECODER,
    "data2vec2_text": TEXT | DECODER,
    "data2vec2_speech": SPEECH | DECODER,
    "vqkd": SMALL | TEACHER | {"teacher.config.top_k_layers": "1", "codebook.size": "32"},
    "beit2": SMALL | TOKENIZER | {"aggregation.layer": "1", "aggregation.depth": "1"},
    "beit3": STREAMS | TOKENIZER,
    "bivl": STREAMS | {"top_k_layers": "1", "contrast.width": "16"},
    "contrastive": SMALL | PAIRS | {"contrast.width": "16"},
    "vqa": SMALL | PAIRS | {"model.depth": "1"},
    "nlvr2": SMALL | PAIRS | {"model.depth": "1"},
    "clip": SMALL | TOWER | {"model.depth": "1", "contrast.width": "16"},
    "vilt": SMALL | PAIRS | {"model.depth": "1"},
    "align": MAPS | TOWER | {"contrast.width": "32", "model.text.depth": "2"},
}
TUNE = {  # what tests/test_finetune.py trains, on more meshes
    "beit3_image": SMALL | {"model.depth": "1"},
    "glue": COMMON | {"text.length": "32", "text.input_length": "32"},
    "ctc": COMMON | {"audio.length": "16000", "audio.eval_length": "16000", "max_letters": "6"},
}
TUNE["ctc"] |= {"model.extractor.width": "16"}
ALL = PRETRAIN | TUNE


def path(name: str) -> str:
    """The config file of an objective."""
    return f"configs/{'finetune' if name in FINETUNE else 'pretrain'}/{name}.py"


def arguments(changes=(), name="data2vec_image"):
    """The small run of a pre-training config with dotted `changes` (a dict), as a command line."""
    settings = ALL[name] | dict(changes)
    config = f"--config={path(name)}:smoke"
    return [config, *(f"--config.{key}={value}" for key, value in settings.items())]


def tiny(changes=(), name="data2vec_image"):
    """The smoke config of a pre-training objective, smaller still, with dotted `changes`."""
    from bivl.core import config as configs

    config = configs.load(f"{path(name)}:smoke")
    configs.override(config, list((ALL[name] | dict(changes)).items()))
    return config


def lines(workdir, name="metrics") -> list[dict]:
    """The objects of a run's metrics.jsonl or evaluations.jsonl."""
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def losses(workdir) -> dict[int, float]:
    """Step -> loss; a step that has two lines fails."""
    found = [(line["step"], line["loss"]) for line in lines(workdir)]
    assert len(dict(found)) == len(found), f"a step has two lines: {[step for step, _ in found]}"
    return dict(found)


def assert_same(first, second) -> None:
    """Two trees of arrays are equal bit for bit."""
    first, second = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (first, second))
    assert len(first) == len(second)
    for (path, a), (_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def without_times(lines):
    """Metrics lines less what a clock makes."""
    clock = {"step_seconds", "data_wait_seconds", "examples_per_second"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def few_losses(num_devices, changes, name="data2vec_image", steps=5):
    """Loss and gradient norm of the first updates on some of the devices, float [steps, 2], and the
    state."""
    from bivl import train
    from bivl.core import sharding
    from bivl.core import state as states

    config = tiny({"steps": str(steps)} | changes, name)
    program = train.build(config, jax.devices()[:num_devices])
    found = []
    with sharding.use(program.mesh):
        state = states.create(program.objective, program.tx, program.mesh, config.seed)
        step, batches = program.compile(), train.open_batches(config, program, 0)
        for n in range(1, steps + 1):
            batch = sharding.to_global(next(batches)[0], program.mesh, program.sizes)
            state, values = step(state, batch, np.int32(n))
            found.append([float(values["loss"]), float(values["grad_norm"])])
        batches.close()
    return np.array(found), state


def mesh(data, fsdp, tensor):
    """The changes that make a mesh of these sizes."""
    return {"mesh.data": str(data), "mesh.fsdp": str(fsdp), "mesh.tensor": str(tensor)}
