"""ALIGN under Hugging Face's names, converted without PyTorch: golden numbers."""

import copy
import functools
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weight_writers
from flax import linen as nn
from flax import traverse_util

import bivl
import conversions
from bivl import convert
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.modalities import towers
from bivl.models.efficientnet import EfficientNet, EfficientNetConfig
from bivl.models.transformer import Tokens
from bivl.weights import align, align_tables, export, matching
from bivl.weights.files import open_weights

sys.path.append(str(Path(__file__).parents[1] / "golden"))
from align_tree import CONFIG, VISION  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compile")
golden = functools.partial(conversions.golden, "align")
CLOSE = 2e-5
SEEN = "vision_model.encoder.blocks.1.expansion.expand_bn.num_batches_tracked"


def batches():
    _, g = golden()
    return {"image": g["images"]}, {"tokens": g["ids"].astype(np.int32)}


def written(folder, tensors, config):
    """A folder as transformers writes it."""
    folder.mkdir()
    weight_writers.safetensors(folder / "model.safetensors", tensors)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def converted(folder, tensors, config, *flags):
    """The model, and conversion.json."""
    source = written(folder / "theirs", tensors, config)
    convert.main([f"--source={source}", f"--out={folder}/ours", *flags])
    report = conversions.read_report("align", folder / "ours")
    return bivl.load(folder / "ours"), report


def close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


def assert_image(loaded):
    _, g = golden()
    got = loaded.encode(batches()[0], layers=True)
    assert len(got["layers"]) == 5
    for i, ours in enumerate(got["layers"]):
        close(ours, g[f"image/layers/{i}"])
    close(got["tokens"], g["image/layers/4"])
    close(got["pooled"], g["image/pooled"])


def assert_text(loaded):
    _, g = golden()
    got = loaded.encode(batches()[1], layers=True)
    for ours, theirs in zip(got["layers"], g["text/layers"], strict=True):
        close(ours, theirs)
    close(got["tokens"], g["text/layers"][-1])
    close(got["pooled"], g["text/layers"][-1][:, 0])
    assert got["padding"].tolist() == (g["ids"] == 0).tolist()


def test_the_whole_model(tmp_path):
    params, g = golden()
    loaded, report = converted(tmp_path, params | {SEEN: np.int64(7)}, CONFIG)
    images, texts = batches()
    assert_image(loaded)
    assert_text(loaded)
    for name, batch in (("image", images), ("text", texts)):
        close(loaded.embed(batch), g[f"{name}/embeddings"])
        close(loaded.predict[f"{name}_embeddings"](images | texts), g[f"{name}/embeddings"])
    close(loaded.predict["logits"](images | texts), g["logits"])
    assert "attention" not in loaded.predict and "patch_features" not in loaded.predict
    dropped = {row["key"] for row in report["dropped"]}
    types = "text_model.embeddings.token_type_embeddings.weight[1/2]"
    assert dropped == {SEEN, types, *(k for k in params if "pooler" in k)}
    c = loaded.config
    assert (c.image_size, c.contrast.width, c.model.widths) == (21, 12, (16, 32, 48))
    assert (c.model.text.rows, c.model.text.vocabulary, c.model.text.depth) == (7, 13, 2)
    assert c.image_mean == c.image_std == (0.5,) * 3 and c.augment.interpolation == "bilinear"


def test_and_back(tmp_path):
    """Tensor by tensor; what was not read comes back too."""
    params, _ = golden()
    given = params | {SEEN: np.int64(7)}
    converted(tmp_path, given, CONFIG)
    convert.main([f"--source={tmp_path}/ours", f"--out={tmp_path}/back", "--to=huggingface"])
    back = open_weights(tmp_path / "back").tensors
    assert set(back) == set(given)
    for name, value in given.items():
        np.testing.assert_array_equal(back[name].read(), value, err_msg=name)
        assert str(back[name].dtype) == str(value.dtype)
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    for key in ("vision_config", "text_config"):
        assert CONFIG[key].items() <= settings[key].items()
    convert.main([f"--source={tmp_path}/back", f"--out={tmp_path}/again"])
    again, (images, texts) = bivl.load(tmp_path / "again"), batches()
    close(again.predict["logits"](images | texts), golden()[1]["logits"])


def test_a_model_from_elsewhere_gets_what_transformers_has_besides(tmp_path):
    """Counts of batches, a pooler and the types of tokens."""
    converted(tmp_path, golden()[0], CONFIG)
    (tmp_path / "ours" / "conversion.json").unlink()
    convert.main([f"--source={tmp_path}/ours", f"--out={tmp_path}/back", "--to=huggingface"])
    back = open_weights(tmp_path / "back").tensors
    counts = {name: tensor for name, tensor in back.items() if name.endswith("num_batches_tracked")}
    assert len(counts) == 1 + 2 * 4 + 3 and SEEN in counts
    assert all(x.read() == 0 and str(x.dtype) == "int64" for x in counts.values())
    assert set(back) == set(golden()[0]) | set(counts)
    types = back["text_model.embeddings.token_type_embeddings.weight"].read()
    assert types.shape == (1, 8) and not types.any()
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["text_config"]["type_vocab_size"] == 1
    assert settings["vision_config"]["hidden_dim"] == 12


@pytest.mark.parametrize("bare", [True, False])
def test_the_image_tower_alone(tmp_path, bare):
    params, g = golden()
    start = "vision_model."
    theirs = {
        k.removeprefix(start) if bare else k: v for k, v in params.items() if k.startswith(start)
    }
    config = VISION | {"model_type": "align_vision_model"}
    loaded, _ = converted(tmp_path, theirs, config)
    assert_image(loaded)
    close(loaded.embed(batches()[0]), g["image/embeddings"])
    assert "logits" not in loaded.predict
    with pytest.raises(UserError, match="no tower of texts; leave text out"):
        loaded.preprocess(text=["a"])
    convert.main([f"--source={tmp_path}/ours", f"--out={tmp_path}/back", "--to=huggingface"])
    assert set(open_weights(tmp_path / "back").tensors) == set(theirs)


def test_the_text_tower_alone(tmp_path):
    theirs = {k: v for k, v in golden()[0].items() if k.startswith("text_model.")}
    flags = ("--family=align", "--config.model.text.num_heads=2", "--config.model.text.eps=1e-3")
    loaded, _ = converted(tmp_path, theirs, {}, *flags)
    assert_text(loaded)


def image_tower():
    """(the module, its parameters, its statistics) of the golden numbers."""
    settings = {ours: VISION[key] for key, ours in align.SETTINGS.items() if key in VISION}
    model = EfficientNet(EfficientNetConfig.of(settings, "float32"))
    tokens = Tokens(jnp.zeros((1, 21, 21, 3)))
    made = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    tree = {"image_trunk": made["params"], "extras": {"statistics": {"image_trunk": {}}}}
    tree["extras"]["statistics"]["image_trunk"] = made["statistics"]
    ours = {k: x.shape for k, x in traverse_util.flatten_dict(tree, sep="/").items()}
    sources = {k: x for k, x in golden()[0].items() if k.startswith("vision_model.")}
    found = matching.match(
        align_tables.image("vision_model."), {k: x.shape for k, x in sources.items()}, ours
    )
    assert not found.missing and not found.unused
    tensors = {k: types.SimpleNamespace(read=lambda x=x: x) for k, x in sources.items()}
    arrays = {k: x.read() for k, x in matching.filled(found, tensors, ours).items()}
    filled = traverse_util.unflatten_dict(arrays, sep="/")
    return model, filled["image_trunk"], filled["extras"]["statistics"]["image_trunk"]


def test_training_takes_the_statistics_of_the_batch():
    """And moves the running ones towards them."""
    _, g = golden()
    model, params, old = image_tower()
    variables, tokens = {"params": params, "statistics": old}, Tokens(jnp.asarray(g["images"]))
    options = {"mutable": ["statistics"], "collect": ("layers",)}
    got, new = jax.jit(lambda v: model.apply(v, tokens, False, **options))(variables)
    for i, ours in enumerate(got.layers):
        close(ours, g[f"train/{i}"])
    for name in ("mean", "variance"):
        wanted = 0.99 * old["stem_norm"][name] + 0.01 * g[f"train/{name}"]
        close(new["statistics"]["stem_norm"][name], wanted)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), old, new["statistics"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("tower", "changes", "words"),
    [
        ("vision", {"hidden_act": "relu"}, "hidden_act='relu', which is not supported"),
        ("vision", {"pooling_type": "max"}, "pooling_type='max', which is not supported"),
        ("vision", {"num_channels": 1}, "num_channels=1, which is not supported"),
        ("vision", {"strides": [1, 2]}, "numbers; give one for each stage"),
        ("vision", {"strides": [1, 2, 3]}, "must be whole numbers"),
        ("vision", {"strides": "122"}, "config.json has strides='122'; copy it again"),
        ("vision", {"width_coefficient": "a"}, "width_coefficient='a'; copy it again"),
        ("vision", {"depth_coefficient": 2.0}, "the file has 4 blocks of images, its config 8"),
        ("vision", {"depth_coefficient": 1e9}, "config.model.depth_scale=1000000000.0 must be"),
        ("vision", {"in_channels": [32, 16, 48]}, "in_channels=[32, 16, 48]; only those of"),
        ("vision", {"image_size": 7}, "config.image_size=7 is too small to be halved 3 times"),
        ("vision", {"expand_ratios": [1, 3, 4]}, "has shape"),
        ("text", {"hidden_act": "relu"}, "hidden_act='relu', which is not supported"),
        ("text", {"position_embedding_type": "relative_key"}, "which is not supported"),
    ],
)
def test_other_models_are_refused(tmp_path, tower, changes, words):
    config = copy.deepcopy(CONFIG)
    config[f"{tower}_config"] |= changes
    source = written(tmp_path / "theirs", golden()[0], config)
    with pytest.raises(UserError) as caught:
        convert.main([f"--source={source}", f"--out={tmp_path}/ours"])
    assert words in str(caught.value) and "\n" not in str(caught.value)


PUBLISHED = {
    "do_center_crop": True,
    "do_normalize": False,
    "do_rescale": True,
    "include_top": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.478, 0.473, 0.474],
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
    "resample": 2,
    "size": {"height": 346, "width": 346},
    "crop_size": {"height": 289, "width": 289},
}
TOP = {"include_top": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
TOP |= {"rescale_offset": False, "do_center_crop": False, "image_mean": [0.5, 0.25, 0.0]}


def test_images_are_seen_as_the_preprocessor_says(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    assert align.views(None) == {} == align.views(tmp_path)
    file.write_text(json.dumps(PUBLISHED))
    got = align.views(tmp_path)
    np.testing.assert_allclose([got.pop("image_mean"), got.pop("image_std")], 0.5, rtol=1e-12)
    assert got == {
        "augment.interpolation": "bilinear",
        "augment.squash": True,
        "augment.squash_to": 346,
        "augment.crop_ratio": 289 / 346,
        "image_size": 289,
    }
    file.write_text(json.dumps(PUBLISHED | TOP | {"image_std": [0.5, 2.0, 1.0]}))
    got = align.views(tmp_path)
    np.testing.assert_allclose(got["image_mean"], [0.5, 0.25, 0.0])
    np.testing.assert_allclose(got["image_std"], [0.25, 4.0, 1.0])
    assert got["image_size"] == got["augment.squash_to"] == 346
    for wrong in ({"rescale_factor": 0}, {"image_std": [0, 1, 1]}, {"image_mean": None}):
        file.write_text(json.dumps(PUBLISHED | TOP | wrong))
        with pytest.raises(UserError, match="is no preprocessor; copy it again"):
            align.views(tmp_path)


def test_all_of_an_image_is_squashed_and_the_centre_cut_out():
    c = configs.load("configs/pretrain/align.py:smoke")
    with c.unlocked():
        c.image_size, c.augment.squash_to, c.tokenizer.kind = 6, 8, "bytes"
    picture = np.zeros((16, 4, 3), np.uint8)
    picture[:, 2:] = 255
    seen = towers.preprocess(c)(image=[picture])["image"][0]
    assert seen.shape == (6, 6, 3)
    np.testing.assert_allclose(seen[:, 0], -1, atol=1e-6)
    np.testing.assert_allclose(seen[:, -1], 1, atol=1e-6)
    assert (np.ptp(seen, axis=0) == 0).all()


def test_what_transformers_lacks_is_said():
    c = configs.load("configs/pretrain/align.py:size=tiny")
    with c.unlocked():
        c.model.stem = 16
    with pytest.raises(UserError, match="transformers' ALIGN has model.stem=32; the model here"):
        align.EXPORTS["huggingface"][0](c, {}, export.Origin())
    with c.unlocked():
        c.model.towers, c.model.text.pool = ("text",), "end"
    with pytest.raises(UserError, match="ALIGN has pool='first'; the text tower here has 'end'"):
        align.EXPORTS["huggingface"][0](c, {}, export.Origin())
