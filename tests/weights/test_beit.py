"""Files with the names of BEiT's own code, converted without PyTorch: golden numbers."""

import json

import jax
import numpy as np
import pytest
from weight_writers import instance, safetensors, torch_zip
from weight_writers import name as class_name

import bivl
from bivl import convert
from bivl.core.errors import UserError
from bivl.weights import files
from bivl.weights.incoming import Official
from golden import vqkd

pytestmark = pytest.mark.usefixtures("quick_compile")
CLOSE = 2e-5
SHARED = "rel_pos_bias.relative_position_bias_table"
HEADS = f"--config.model.num_heads={vqkd.HEADS}"


@pytest.fixture(scope="module")
def recorded():
    arrays = vqkd.load()
    return {k.removeprefix("mim/"): v for k, v in arrays.items() if k.startswith("mim/")}


def theirs(recorded, version: int = 2):
    params = {k.removeprefix("params/"): v for k, v in recorded.items() if k.startswith("params/")}
    params["rel_pos_bias.relative_position_index"] = np.ones((17, 17), np.int64)
    return {k: v for k, v in params.items() if version == 2 or not k.startswith("cls_pt_layers")}


def converted(folder, params, *flags, name="ours"):
    safetensors(folder / "theirs.safetensors", params)
    out = folder / name
    convert.main([f"--source={folder}/theirs.safetensors", f"--out={out}", *flags])
    report = json.loads((out / "conversion.json").read_text())
    assert not report["missing"] and not report["unused"]
    return out, report


@pytest.mark.parametrize("version", [1, 2])
def test_pretrained(version, tmp_path, recorded):
    """The head on the masked places; v2's aggregation comes along."""
    out, report = converted(tmp_path, theirs(recorded, version))
    assert report["family"] == {1: "beit", 2: "beit2"}[version] and not report["initialised"]
    loaded = bivl.load(out)
    mask = recorded["mask"].astype(bool)
    batch = {"image": recorded["images"].astype(np.float32), "mask": mask}
    tokens = np.asarray(loaded.predict["masked"](batch))[mask]
    head = loaded.params["lm_head"]
    logits = tokens @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(logits, recorded["logits/main"], rtol=0, atol=CLOSE)
    wanted = vqkd.mim(lambda name: recorded[f"params/{name}"])
    if version == 1:
        del wanted["aggregator"]
    assert jax.tree.structure(loaded.params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)
    half = version == 1  # v2 has ImageNet's
    assert (loaded.config.image_mean[0] == 0.5) == half


def tuned(recorded, own: bool):
    """With a classifier; `own`: the table copied into every layer."""
    params = theirs(recorded, 1)
    for name in ("lm_head.weight", "lm_head.bias", "norm.weight", "norm.bias", "mask_token"):
        del params[name]
    if own:
        table = params.pop(SHARED)
        del params["rel_pos_bias.relative_position_index"]
        for i in range(3):
            params[f"blocks.{i}.attn.relative_position_bias_table"] = table
    rng = np.random.default_rng(1)
    shapes = {"fc_norm.weight": (16,), "fc_norm.bias": (16,)}
    shapes |= {"head.weight": (5, 16), "head.bias": (5,)}
    return params | {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize(("own", "family"), [(True, "beit"), (True, "beit2"), (False, "beit2")])
def test_fine_tuned(own, family, tmp_path, recorded):
    """The layers are those of the pre-trained model; the statistics of pixels the version's."""
    batch = {"image": recorded["images"].astype(np.float32)}
    before, _ = converted(tmp_path, theirs(recorded, 1), name="before")
    wanted = bivl.load(before).encode(batch, layers=True)["layers"]
    params = tuned(recorded, own)
    out, report = converted(tmp_path, params, f"--family={family}")
    assert report["family"] == family
    loaded = bivl.load(out)
    assert loaded.config.image_mean[0] == {"beit": 0.5, "beit2": 0.485}[family]
    assert loaded.config.image_std[0] == {"beit": 0.5, "beit2": 0.229}[family]
    got = loaded.encode(batch, layers=True)["layers"]
    for ours, others in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, others, rtol=0, atol=CLOSE)
    mean = np.asarray(wanted[-1], np.float64)[:, 1:].mean(1)
    normed = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    normed = normed * params["fc_norm.weight"] + params["fc_norm.bias"]
    logits = normed @ params["head.weight"].T + params["head.bias"]
    np.testing.assert_allclose(loaded.predict["logits"](batch), logits, rtol=0, atol=1e-4)


def test_whose_a_fine_tuned_file_is_must_be_said(tmp_path, recorded):
    """Both versions' and data2vec's look the same, whose pixels have other statistics."""
    with pytest.raises(UserError, match="may be of beit or beit2 or data2vec .*pass --family="):
        converted(tmp_path, tuned(recorded, own=True))


@pytest.mark.parametrize("family", ["beit", "beit2", "data2vec"])
@pytest.mark.parametrize("imagenet", [True, False])
def test_the_file_says_which_statistics(imagenet, family, tmp_path, recorded):
    """What a file was trained with goes before what is usual."""
    args = class_name("argparse", "Namespace")
    args = instance(args, imagenet_default_mean_and_std=imagenet)
    file = tmp_path / "theirs.pth"
    torch_zip(file, {"model": tuned(recorded, own=True), "args": args})
    plan = Official(file, None, family, convert.families(), False).plan
    config = convert.configured(plan)
    assert config.image_mean[0] == (0.485 if imagenet else 0.5)
    assert config.image_std[0] == (0.229 if imagenet else 0.5)


def test_to_huggingface_and_back(tmp_path, recorded):
    """The aggregation stays behind; all else returns as it was."""
    one, _ = converted(tmp_path, theirs(recorded))
    convert.main([f"--source={one}", f"--out={tmp_path}/hf", "--to=huggingface"])
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["BeitForMaskedImageModeling"]
    assert settings["vocab_size"] == 10 and settings["use_shared_relative_position_bias"]
    report = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert {row["key"].split("/")[0] for row in report["dropped"]} == {"aggregator"}
    names = files.open_weights(tmp_path / "hf").tensors
    assert {"layernorm.weight", "lm_head.bias", "beit.embeddings.mask_token"} <= set(names)
    convert.main([f"--source={tmp_path}/hf", f"--out={tmp_path}/again"])
    before, after = bivl.load(one), bivl.load(tmp_path / "again")
    for path in ("embed", "trunk", "norm", "lm_head"):
        jax.tree.map(np.testing.assert_array_equal, before.params[path], after.params[path])
    assert after.config.image_mean == before.config.image_mean
    assert after.config.augment.crop_ratio == pytest.approx(before.config.augment.crop_ratio, 0.1)
    (tmp_path / "hf" / "preprocessor_config.json").unlink()  # BEiT's own statistics, then
    convert.main([f"--source={tmp_path}/hf", f"--out={tmp_path}/alone"])
    assert bivl.load(tmp_path / "alone").config.image_mean == (0.5,) * 3


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cls_pt_layers.1.gamma_2", None, "is missing, for aggregator/blocks/scale2/value[1]"),
        ("lm_head.bias", None, "lm_head.bias is missing, for lm_head/bias"),
        ("blocks.0.attn.k_bias", np.ones(16, "f"), "blocks.0.attn.k_bias is not used"),
        (SHARED, np.ones((50, 2), "f"), "has 50 rows, which no square grid has"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key, value, said, tmp_path, recorded):
    params = theirs(recorded)
    params.pop(key, None)
    params |= {} if value is None else {key: value}
    with pytest.raises(UserError) as caught:
        converted(tmp_path, params)
    assert said in str(caught.value) and "\n" not in str(caught.value)
