"""Files with the names of data2vec's own code, converted without PyTorch: golden numbers."""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util

import bivl
import sequences
from bivl import convert
from bivl.core import checkpoint
from bivl.core.errors import UserError
from bivl.data import audio
from bivl.weights.files import open_weights
from golden import data2vec_vision, sequence_files

pytestmark = pytest.mark.usefixtures("quick_compile")
CLOSE = 2e-5


def recorded(name):
    """(parameters by their names there, the teacher's, all arrays) of a recorded model."""
    if name == "data2vec_vision":
        arrays = data2vec_vision.load()
    elif name == "data2vec2_vision":
        with np.load(data2vec_vision.FILE.with_name("data2vec2_vision.npz")) as file:
            arrays = dict(file)
    else:
        arrays = sequence_files.load(name)
    kinds = ("params/", "param/"), ("teacher_params/", "teacher_param/")
    groups = (
        {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(starts)}
        for starts in kinds
    )
    student, teacher = ({k: v for k, v in g.items() if "/" not in k} for g in groups)
    return student, teacher, arrays


def converted(folder, params, *flags):
    """The parameters as a file, converted; conversion.json."""
    np.savez(folder / "theirs.npz", **params)
    out = folder / "ours"
    convert.main([f"--source={folder}/theirs.npz", f"--out={out}", *flags])
    report = json.loads((out / "conversion.json").read_text())
    assert not report["missing"] and not report["unused"]
    return out, report


def close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


def assert_layers(loaded, batch, wanted):
    got = loaded.encode(batch, layers=True)
    assert len(got["layers"]) == len(wanted)
    for ours, theirs in zip(got["layers"], wanted, strict=True):
        close(ours, theirs)
    return got


def test_image_of_the_original_code(tmp_path):
    """The teacher's recorded layers: its parameters, as the file's."""
    _, params, g = recorded("data2vec_vision")
    params["rel_pos_bias.relative_position_index"] = g["relative_position_index/4x4"]
    out, report = converted(tmp_path, params)
    got = assert_layers(
        bivl.load(out), {"image": g["images"].astype(np.float32)}, g["teacher/layers"]
    )
    close(got["tokens"], g["teacher/tokens"])
    close(got["pooled"], g["teacher/tokens"][:, 0])
    assert [row["key"] for row in report["dropped"]] == ["rel_pos_bias.relative_position_index"]
    assert len(report["mapped"]) == len(params) - 1 and not report["initialised"]


def test_image_of_the_port_is_the_same_model(tmp_path):
    """fairseq's names; its norms have another eps."""
    _, params, g = recorded("data2vec_vision")
    renamed = {}
    for name, value in params.items():
        for old, new in (
            ("cls_token", "cls_emb"),
            ("mask_token", "mask_emb"),
            ("patch_embed.proj", "patch_embed.conv"),
            ("rel_pos_bias.", "encoder.rel_pos_bias."),
            ("blocks.", "encoder.blocks."),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.2"),
            ("lm_head", "final_proj"),
        ):
            name = name.replace(old, new)
        renamed[f"encoder.{name}" if name.startswith("norm.") else name] = value
    renamed["_ema.norm.weight"] = params["norm.weight"]
    out, report = converted(tmp_path, renamed, "--config.model.eps=1e-6")
    assert_layers(bivl.load(out), {"image": g["images"].astype(np.float32)}, g["teacher/layers"])
    assert {row["key"].split(".")[0] for row in report["dropped"]} == {"final_proj", "_ema"}
    assert {row["path"] for row in report["initialised"]} == {
        "head/projection/kernel",
        "head/projection/bias",
    }


def test_fine_tuned_image(tmp_path):
    """Tables of each layer are no business of this test; the classifier is."""
    _, params, g = recorded("data2vec_vision")
    rng = np.random.default_rng(0)
    for name in ("lm_head.weight", "lm_head.bias", "norm.weight", "norm.bias", "mask_token"):
        del params[name]
    scale, bias, kernel = (
        rng.standard_normal(s).astype(np.float32) for s in ((32,), (32,), (5, 32))
    )
    params |= {"fc_norm.weight": scale, "fc_norm.bias": bias, "head.weight": kernel}
    params["head.bias"] = np.arange(5, dtype=np.float32)
    out, _ = converted(tmp_path, params, "--family=data2vec")
    loaded = bivl.load(out)
    batch = {"image": g["images"].astype(np.float32)}
    got = assert_layers(loaded, batch, g["teacher/layers"])
    close(got["tokens"], g["teacher/layers"][-1])
    mean = g["teacher/layers"][-1][:, 1:].mean(1)
    spread = np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    pooled = (mean - mean.mean(-1, keepdims=True)) / spread * scale + bias
    close(loaded.predict["logits"](batch), (pooled @ kernel.T + np.arange(5)).astype(np.float32))


HEADS = "--config.model.num_heads=4"


def tracked(out):
    """The teacher of a checkpoint, by path."""
    step = checkpoint.find(out)
    saved = checkpoint.saved_shapes(step)
    shapes = {k.split("/", 1)[1]: v for k, v in saved.items() if k.startswith("teacher/")}
    tree = {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()}
    wanted = {"teacher": traverse_util.unflatten_dict(tree, sep="/")}
    return traverse_util.flatten_dict(checkpoint.restore_part(step, wanted)["teacher"], sep="/")


def assert_tracked(out, name):
    """The file's `_ema` is the recorded student here, so the teacher must be its parameters."""
    wanted = traverse_util.flatten_dict(sequences.tree(name, "param"), sep="/")
    found = tracked(out)
    config = checkpoint.read_config(checkpoint.find(out))
    shared = (*config.ema_shared, "decoder")
    assert set(found) == {k for k in wanted if not k.startswith(tuple(f"{s}/" for s in shared))}
    for key, value in found.items():
        np.testing.assert_array_equal(value, wanted[key], err_msg=key)


@pytest.mark.parametrize("encoder", ["encoder", "decoder"])
def test_text_of_fairseq(encoder, tmp_path):
    """Its names, and those that old files have."""
    student, teacher, g = recorded("data2vec_text")
    params = student | teacher
    for name, value in student.items():
        if "sentence_encoder" in name:
            params[name.replace("sentence_encoder.", "_ema.")] = value
    params["encoder.sentence_encoder.version"] = np.ones(1, np.float32)
    if encoder == "decoder":
        old = {"layernorm_embedding": "emb_layer_norm", "regression_head": "lm_head"}
        for fairseq, before in {
            **old,
            "encoder.": "decoder.",
            "sentence_decoder": "sentence_encoder",
        }.items():
            params = {name.replace(fairseq, before, 1): x for name, x in params.items()}
    out, report = converted(tmp_path, params, HEADS, "--teacher")
    tokens = g["paper/tokens"].astype(np.int32)
    assert_layers(bivl.load(out), {"tokens": tokens}, g["paper/layers"])
    assert_tracked(out, "data2vec_text")
    assert not report["initialised"]


@pytest.mark.parametrize("head", ["final_proj.", "final_proj.0."])
def test_audio_of_fairseq(head, tmp_path):
    student, teacher, g = recorded("data2vec_audio")
    params = {name.replace("final_proj.", head): x for name, x in (student | teacher).items()}
    for name, value in student.items():
        if name.startswith("encoder."):
            params[name.replace("encoder.", "_ema.")] = value
    out, report = converted(tmp_path, params, HEADS, "--teacher")
    rows = [
        audio.normalize(x[:n].astype(np.float32))
        for x, n in zip(g["raw"], g["lengths"], strict=True)
    ]
    padded = np.stack([np.pad(x, (0, g["raw"].shape[1] - len(x))) for x in rows])
    batch = {"audio": padded, "length": g["lengths"].astype(np.int32)}
    assert_layers(bivl.load(out), batch, g["teacher/layers"])
    assert_tracked(out, "data2vec_audio")
    assert not report["initialised"]


def assert_given_back(out, params):
    """Under the names that its own code has, the same numbers; the averaged model stays behind."""
    back = out.with_name("back")
    convert.main([f"--source={out}", f"--out={back}", "--to=official"])
    found = open_weights(back).tensors
    assert set(found) == {name for name in params if "_ema." not in name}
    for name, tensor in found.items():
        if name.endswith("positions"):  # computed
            close(tensor.read(), np.asarray(params[name]))
        else:
            np.testing.assert_array_equal(tensor.read(), params[name], err_msg=name)
    return back


def ema(params, start="_ema."):
    return {f"{start}{name}": value for name, value in params.items()}


@pytest.mark.parametrize("prenet", [0, 1])
def test_image_of_2(prenet, tmp_path):
    """Blocks of the context encoder come first; the positions are the fixed ones."""
    student, params, g = recorded("data2vec2_vision")
    own = "modality_encoders.IMAGE."
    params |= {name: value for name, value in student.items() if "decoder" in name}
    params[f"{own}fixed_positional_encoder.positions"] = g["positions"][None]
    params |= ema({name: value for name, value in student.items() if "decoder" not in name})
    if prenet:
        moved = {
            "blocks.0.": f"{own}context_encoder.blocks.0.",
            "blocks.1.": "blocks.0.",
            "blocks.2.": "blocks.1.",
        }
        for i, (old, new) in enumerate(moved.items()):
            for start in ("", "_ema."):
                found = [name for name in params if name.startswith(start + old)]
                for name in found:
                    params[start + new + name.removeprefix(start + old)] = params.pop(name)
            assert found, i
    out, report = converted(tmp_path, params, "--config.model.num_heads=2", "--teacher")
    loaded = bivl.load(out)
    assert_layers(loaded, {"image": g["images"].astype(np.float32)}, g["teacher/layers"])
    assert loaded.config.model.positions == "sincos"
    assert loaded.config.decoder.groups == 4 and not report["initialised"]
    assert [row["key"] for row in report["dropped"]] == [f"{own}fixed_positional_encoder.positions"]
    scale = tracked(out)["trunk/blocks/norm1/scale"]
    close(np.asarray(scale), np.stack([student[f"blocks.{i}.norm1.weight"] for i in range(3)]))
    back = assert_given_back(out, params)
    again = tmp_path / "again"  # the heads that the file could not tell stand in config.json
    convert.main([f"--source={back}", f"--out={again}"])
    assert bivl.load(again).config.model == loaded.config.model


def test_other_positions_become_learned_ones(tmp_path):
    _, params, g = recorded("data2vec2_vision")
    moved = g["positions"][::-1]
    params["modality_encoders.IMAGE.fixed_positional_encoder.positions"] = moved[None]
    out, report = converted(tmp_path, params, "--config.model.num_heads=2")
    loaded = bivl.load(out)
    close(np.asarray(loaded.params["embed"]["positions"]["table"]["value"]), moved.astype("f"))
    assert {row["path"].split("/")[0] for row in report["initialised"]} == {"decoder"}


def test_text_of_2(tmp_path):
    student, teacher, g = recorded("data2vec2_text")
    params = student | teacher
    blocks = {name: value for name, value in student.items() if name.startswith("blocks.")}
    params |= {name.replace("blocks.", "_ema."): value for name, value in blocks.items()}
    out, report = converted(tmp_path, params, HEADS, "--teacher")
    assert_layers(bivl.load(out), {"tokens": g["tokens"].astype(np.int32)}, g["teacher/layers"])
    assert_tracked(out, "data2vec2_text")
    assert not report["initialised"]
    assert_given_back(out, params)


@pytest.mark.parametrize("rank", [5, 4])
def test_audio_of_2(rank, tmp_path):
    """The heads follow from ALiBi's scales, which old files have with an axis less."""
    student, teacher, g = recorded("data2vec2_audio")
    params = student | teacher | ema({name: student[name] for name in teacher})
    if rank == 4:
        for name in [name for name in params if name.endswith("alibi_scale")]:
            params[name] = params[name][0]
    out, report = converted(tmp_path, params, "--teacher")
    rows = np.stack([audio.normalize(x.astype(np.float32)) for x in g["raw"]])
    batch = {"audio": rows, "length": np.full(len(rows), rows.shape[1], np.int32)}
    assert_layers(bivl.load(out), batch, g["teacher/layers"])
    assert_tracked(out, "data2vec2_audio")
    assert not report["initialised"]
    if rank == 5:
        assert_given_back(out, params)


def tuned(name, wrapper):
    """The recorded model in a wrapper of fine-tuning, and the width of its encoder."""
    student, teacher, g = recorded(name)
    params = {k: v for k, v in (student | teacher).items() if "decoder" not in k}
    return {f"{wrapper}{k}": v for k, v in params.items()}, g


@pytest.mark.parametrize("name", ["data2vec_audio", "data2vec2_audio"])
def test_letters(name, tmp_path):
    """fairseq's wrapper for CTC; letters by their order in its dictionary."""
    params, g = tuned(name, "w2v_encoder.w2v_model.")
    rng = np.random.default_rng(0)
    kernel, bias = (0.1 * rng.standard_normal(s).astype("f") for s in ((7, 32), (7,)))
    params |= {"w2v_encoder.proj.weight": kernel, "w2v_encoder.proj.bias": bias}
    out, report = converted(tmp_path, params, HEADS)
    loaded = bivl.load(out)
    assert len(loaded.config.letters) == 6 and loaded.config.letters.endswith("|")
    lengths = g.get("lengths", np.full(2, g["raw"].shape[1])).astype(np.int32)
    rows = [audio.normalize(x[:n].astype("f")) for x, n in zip(g["raw"], lengths, strict=True)]
    padded = np.stack([np.pad(x, (0, g["raw"].shape[1] - len(x))) for x in rows])
    got, _ = loaded.predict["log_probs"]({"audio": padded, "length": lengths})
    logits = g["teacher/layers"][-1].astype("f") @ kernel.T + bias
    logits -= logits.max(-1, keepdims=True)
    close(np.asarray(got), logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    if name.startswith("data2vec2"):
        assert_given_back(out, params)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [("data2vec_text", ""), ("data2vec_text", "model."), ("data2vec2_text", "model.")],
)
def test_classes_of_texts(name, wrapper, tmp_path):
    """RoBERTa's head: a map, tanh, a map."""
    params, g = tuned(name, wrapper)
    rng, head = np.random.default_rng(0), "classification_heads.sentence_classification_head."
    first, last = (rng.standard_normal(s).astype("f") for s in ((32, 32), (3, 32)))
    params |= {f"{head}dense.weight": first, f"{head}dense.bias": np.ones(32, "f")}
    params |= {f"{head}out_proj.weight": last, f"{head}out_proj.bias": np.arange(3, dtype="f")}
    out, _ = converted(tmp_path, params, HEADS)
    start = "paper/" if name == "data2vec_text" else "teacher/"
    tokens = g["tokens" if name == "data2vec2_text" else "paper/tokens"].astype(np.int32)
    logits = np.tanh(g[f"{start}layers"][-1][:, 0] @ first.T + 1) @ last.T + np.arange(3)
    close(np.asarray(bivl.load(out).predict["logits"]({"tokens": tokens})), logits.astype("f"))
    if name.startswith("data2vec2"):
        assert_given_back(out, params)


def broken(name, change):
    """The error of converting recorded parameters after `change(params)`."""

    def run(folder, *flags):
        params = dict(recorded(name)[0])
        change(params)
        with pytest.raises(UserError) as error:
            converted(folder, params, *flags)
        assert not (folder / "ours").exists() and "\n" not in str(error.value)
        return str(error.value)

    return run


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    def change(params):
        params["blocks.1.mlp.fc2.weight"] = np.zeros((32, 127), np.float32)

    line = broken("data2vec_vision", change)(tmp_path)
    assert "blocks.1.mlp.fc2.weight has shape (32, 127)" in line
    assert "trunk/blocks/mlp/fc2/kernel[1]" in line and "(32, 128)" in line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "blocks.1.norm2.bias",
            None,
            "blocks.1.norm2.bias is missing, for trunk/blocks/norm2/bias[1]",
        ),
        ("norm.bias", None, "norm.bias is missing, for trunk/norm/bias"),
        ("blocks.1.attn.gate", np.ones(3, np.float32), "blocks.1.attn.gate is not used"),
        ("norm.scale", np.ones(3, np.float32), "norm.scale is not used"),
        (
            "norm.weight",
            np.full(32, np.nan, np.float32),
            "norm.weight holds values that are not finite",
        ),
        ("norm.weight", np.full(32, 1e300), "norm.weight holds values that are not finite"),
        ("norm.weight", np.ones(32, np.int64), "norm.weight holds int64"),
        ("patch_embed.proj.weight", None, "no known family"),
        ("cls_token", np.ones((1, 2, 32), np.float32), "cls_token has shape (1, 2, 32)"),
        ("blocks.77.norm1.weight", np.ones(32, np.float32), "blocks.77.norm1.weight is not used"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key, value, said, tmp_path):
    def change(params):
        params.pop(key, None)
        params |= {} if value is None else {key: value}

    assert said in broken("data2vec_vision", change)(tmp_path)


def test_what_a_file_does_not_tell_is_asked_for(tmp_path):
    def nothing(params):
        pass

    assert "--config.model.num_heads=..." in broken("data2vec_audio", nothing)(tmp_path)
    flags = HEADS, "--family=beit3x"
    assert "--family=beit3x is unknown" in broken("data2vec_audio", nothing)(tmp_path, *flags)
    assert "no averaged model" in broken("data2vec_vision", nothing)(tmp_path, "--teacher")
    assert "data2vec2's" in broken("data2vec_audio", nothing)(tmp_path, "--family=data2vec2")


def test_nothing_is_overwritten(tmp_path):
    params = recorded("data2vec_vision")[0]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "note").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        converted(tmp_path, params)
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["note"]
