"""torchscale's BEiT-3 with random weights and the heads of its fine-tuning code, saved by PyTorch,
converted and loaded; and given back.

The heads stand in microsoft/unilm's `beit3/modeling_finetune.py`, which is no package; here they
are modules of the same names.
"""

import json

import numpy as np
import pytest
from test_torchscale import SIZES, build, recorder, run, torchscale  # noqa: F401 (fixtures)

import bivl
from bivl import convert
from bivl.weights import files

torch = pytest.importorskip("torch")
pytest.importorskip("torchscale")
pytestmark = pytest.mark.live

LENGTHS = (6, 9, 4)
CLASSES, CODES = 5, 13
CLOSE = 1e-4


def heads(task, config):
    """The modules beside `beit3` in a model of this task."""
    D, linear = config.width, torch.nn.Linear
    made = {
        "pretrained": {"mlm_head": linear(D, config.vocabulary), "mim_head": linear(D, CODES)},
        "retrieval": {
            "vision_head": linear(D, D, bias=False),
            "language_head": linear(D, D, bias=False),
        },
        "classes": {"fc_norm": torch.nn.LayerNorm(D), "head": linear(D, CLASSES)},
        "captions": {"mlm_head": linear(D, config.vocabulary)},
        "answers": {
            "pooler": torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(D), "dense": linear(D, D)}),
            "head": torch.nn.Sequential(
                linear(D, 2 * D), torch.nn.LayerNorm(2 * D), torch.nn.GELU(), linear(2 * D, 7)
            ),
        },
        "pairs": {
            "head": torch.nn.ModuleDict(
                {
                    "norm1": torch.nn.LayerNorm(4 * D),
                    "dense1": linear(4 * D, 2 * D),
                    "norm2": torch.nn.LayerNorm(2 * D),
                    "dense2": linear(2 * D, 2),
                }
            )
        },
    }[task]
    whole = torch.nn.ModuleDict(made)
    if task == "retrieval":
        whole.logit_scale = torch.nn.Parameter(torch.tensor(2.6))
    return whole


CASES = [
    ("recorded", "pretrained", "model"),
    ("odd_head", "retrieval", "module"),
    ("one_patch", "classes", "model"),
    ("odd_head", "captions", ""),
    ("one_patch", "answers", "model"),
    ("recorded", "pairs", "model"),
]


@pytest.fixture(params=CASES, ids=lambda case: case[1])
def case(request, recorder, torchscale, tmp_path):  # noqa: F811
    """Sizes, the model, its heads, inputs, and a file of its weights."""
    size, task, part = request.param
    config = recorder.reference.ModelConfig(*SIZES[size])
    rng = np.random.default_rng(len(task))
    model, top = build(torchscale, config), heads(task, config)
    recorder.randomize(model, rng)
    if task in ("classes", "answers"):  # as normalize_output=False makes it
        model.encoder.layer_norm = None
    state = {f"beit3.{k}": v for k, v in model.state_dict().items()} | top.state_dict()
    path = tmp_path / "theirs.pth"
    torch.save({part: state, "epoch": 3} if part else state, path)
    inputs = recorder.make_inputs(rng, config, LENGTHS)
    return config, task, model, top, inputs, state, path


def converted(path, config, out):
    convert.main(
        [f"--source={path}", f"--out={out}", f"--config.model.num_heads={config.num_heads}"]
    )
    report = json.loads((out / "conversion.json").read_text())
    assert report["family"] == "beit3" and not report["missing"] and not report["unused"]
    return bivl.load(out), report


def batch(given):
    found = {}
    if "image" in given:
        found["image"] = given["image"].permute(0, 2, 3, 1).numpy().astype(np.float32)
    if "tokens" in given:
        found["tokens"] = given["tokens"].numpy().astype(np.int32)
    return found


def close(ours, theirs, valid=np.s_[:]):
    assert ours.shape == tuple(theirs.shape)
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours)[valid], theirs[valid], rtol=0, atol=CLOSE)


def test_converted_equals_torchscale(case, recorder, tmp_path):  # noqa: F811
    config, task, model, top, inputs, _, path = case
    loaded, report = converted(path, config, tmp_path / "ours")
    calls = ("image",) if task == "classes" else ("image", "text", "pair")
    last = {}
    for call in calls:
        given = {name: inputs[name] for name in recorder.CALLS[call]}
        given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
        wanted, tokens = run(model, given)
        got = loaded.encode(batch(given), layers=True)
        valid = ~np.asarray(got["padding"]) if "padding" in got else np.s_[:]
        for ours, theirs in zip(got["layers"], wanted, strict=True):
            close(ours, theirs, valid)
        close(got["tokens"], tokens, valid)
        close(got["pooled"], tokens[:, 0])
        last[call] = tokens
    image, text = (batch({k: inputs[k]}) for k in ("image", "tokens"))
    if task == "classes":
        pooled = top["fc_norm"](last["image"][:, 1:].mean(1))
        close(loaded.predict["logits"](image), top["head"](pooled))
    elif task == "retrieval":
        vectors = []
        for name, call, given in (("vision", "image", image), ("language", "text", text)):
            projected = top[f"{name}_head"](last[call][:, 0])
            vectors.append(torch.nn.functional.normalize(projected, dim=-1))
            close(loaded.embed(given), vectors[-1])
        logits = top.logit_scale.exp() * vectors[0] @ vectors[1].T
        np.testing.assert_allclose(
            loaded.predict["logits"](image | text), logits.detach().numpy(), rtol=0, atol=1e-3
        )
    elif task == "answers":
        pooled = top["pooler"]["dense"](top["pooler"]["norm"](last["pair"][:, 0])).tanh()
        close(loaded.predict["logits"](image | text), top["head"](pooled))
        assert {row["key"] for row in report["dropped"]} == {"epoch"}
    elif task == "pairs":
        close(*compared(loaded, model, top["head"], inputs))
        assert {row["key"] for row in report["dropped"]} == {"epoch"}


def compared(loaded, model, head, inputs):
    """(ours, PyTorch's) logits of NLVR2: left images with the text, then right ones, as one
    batch."""
    left, words = inputs["image"].float(), {k: inputs[k] for k in ("tokens", "padding")}
    right = left.flip(0)
    twice = {name: torch.cat([x, x]) for name, x in words.items()}
    x = run(model, {"image": torch.cat([left, right])} | twice)[1]
    start = x.shape[1] - words["tokens"].shape[1]
    one, two = torch.cat([x[:, 0], x[:, start]], -1).chunk(2)
    hidden = head["dense1"](head["norm1"](torch.cat([one, two], -1)))
    wanted = head["dense2"](torch.nn.functional.gelu(head["norm2"](hidden)))
    given = batch({"image": left, "tokens": words["tokens"]})
    return loaded.predict["logits"](given | {"image2": batch({"image": right})["image"]}), wanted


def test_and_back_equals_what_there_was(case, tmp_path):
    """Tensor by tensor."""
    config, task, _, _, _, state, path = case
    converted(path, config, tmp_path / "ours")
    convert.main([f"--source={tmp_path}/ours", f"--out={tmp_path}/back", "--to=official"])
    again = files.open_weights(tmp_path / "back").tensors
    lost = set()
    if task == "classes":  # which PyTorch's files lose
        lost = {name for name in state if ".B." in name or "text_embed" in name}
    assert set(again) >= set(state) - lost
    for name in again:
        np.testing.assert_array_equal(again[name].read(), state[name].numpy(), err_msg=name)
    loaded, _ = converted(tmp_path / "back", config, tmp_path / "again")
    assert loaded.config.model.num_heads == config.num_heads
