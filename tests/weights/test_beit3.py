"""Files with the names of BEiT-3's own code, converted without PyTorch: golden numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from weight_writers import safetensors, torch_zip

import bivl
import image_texts
from bivl import convert
from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.weights import files
from bivl.weights.transforms import TRANSFORMS
from golden import beit3_tree

pytestmark = pytest.mark.usefixtures("quick_compile")
HEADS = "--config.model.num_heads=3"
WIDTH, VOCABULARY, CODES = 24, 50, 11
PIECES = Path(tokenizers.__file__).parent / "pieces" / "small_xlmr.model"


@pytest.fixture(scope="module")
def recorded():
    return beit3_tree.load()


def encoder(recorded):
    return {k.split("/")[1]: v for k, v in recorded.items() if k.startswith("params/")}


def drawn(**shapes):
    """Random tensors; `__` in a name is a dot."""
    rng = np.random.default_rng(4)
    return {
        name.replace("__", "."): np.asarray(0.5 * rng.standard_normal(shape), np.float32)
        for name, shape in shapes.items()
    }


def masked_heads():
    words, codes = (VOCABULARY,), (CODES,)
    return drawn(
        mlm_head__weight=(*words, WIDTH),
        mlm_head__bias=words,
        mim_head__weight=(*codes, WIDTH),
        mim_head__bias=codes,
    )


def classifier(classes: int = 5):
    return drawn(
        fc_norm__weight=(WIDTH,),
        fc_norm__bias=(WIDTH,),
        head__weight=(classes, WIDTH),
        head__bias=(classes,),
    )


def converted(folder, params, *flags, write=safetensors):
    """The parameters as a file, converted; conversion.json."""
    out = folder / "ours"
    write(folder / "theirs", params)
    convert.main([f"--source={folder}/theirs", f"--out={out}", HEADS, *flags])
    report = json.loads((out / "conversion.json").read_text())
    assert report["family"] == "beit3" and not report["missing"] and not report["unused"]
    return out, report


def inputs(recorded, *names):
    arrays = {"image": recorded["image"], "tokens": recorded["tokens"].astype(np.int32)}
    return {name: arrays[name] for name in names}


def close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=beit3_tree.CLOSE)


def assert_layers(loaded, recorded, call, last: bool = True):
    """Every layer at what is no padding, and what comes after the final norm or, without, before
    it."""
    names = {"image": ("image",), "text": ("tokens",), "pair": ("image", "tokens")}[call]
    got, wanted = loaded.encode(inputs(recorded, *names), layers=True), recorded[f"{call}/layers"]
    valid = ~np.asarray(got["padding"]) if "padding" in got else np.s_[:]
    assert len(got["layers"]) == len(wanted)
    for ours, theirs in zip(got["layers"], wanted, strict=True):
        close(np.asarray(ours)[valid], theirs[valid])
    tokens = recorded[f"{call}/tokens"] if last else wanted[-1]
    close(np.asarray(got["tokens"])[valid], tokens[valid])
    close(got["pooled"], tokens[:, 0])
    return got


def given_back(out, folder, params):
    """--to=official gives every tensor as it was."""
    convert.main([f"--source={out}", f"--out={folder}/back", "--to=official"])
    again = files.open_weights(folder / "back").tensors
    assert set(again) == set(params)
    for name, value in params.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name].read(), value, err_msg=name)
    return folder / "back"


@pytest.mark.parametrize("start", ["beit3.", ""])
def test_pretrained(start, tmp_path, recorded):
    """The wrapper with both heads, and torchscale's encoder alone; there and back."""
    params = {name.replace("beit3.", start): x for name, x in encoder(recorded).items()}
    params |= masked_heads() if start else {}
    out, report = converted(tmp_path, params)
    loaded = bivl.load(out)
    for call in ("image", "text", "pair"):
        assert_layers(loaded, recorded, call)
    assert not report["dropped"] and not report["initialised"]
    if start:
        head = loaded.params["heads"]["mim_head"]
        np.testing.assert_array_equal(head["kernel"], params["mim_head.weight"].T)
        assert loaded.params["heads"]["mlm_head"]["bias"].shape == (VOCABULARY,)
    else:
        assert "heads" not in loaded.params
    back = given_back(out, tmp_path, params)
    made = json.loads((back / "config.json").read_text())
    assert (made["model_type"], made["encoder_attention_heads"], made["vocab_size"]) == (
        "beit3",
        3,
        VOCABULARY,
    )


def test_contrastive(tmp_path, recorded):
    """itc and retrieval; the scale of similarities is one number."""
    heads = drawn(vision_head__weight=(WIDTH, WIDTH), language_head__weight=(WIDTH, WIDTH))
    params = encoder(recorded) | heads | {"logit_scale": np.float32(2.3)}
    out, report = converted(tmp_path, params)
    loaded = bivl.load(out)
    assert_layers(loaded, recorded, "image")
    vectors = []
    for call, name, key in (("image", "vision", "image"), ("text", "language", "tokens")):
        wanted = recorded[f"{call}/tokens"][:, 0] @ heads[f"{name}_head.weight"].T
        wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
        close(loaded.embed(inputs(recorded, key)), wanted)
        vectors.append(wanted)
    logits = loaded.predict["logits"](inputs(recorded, "image", "tokens"))
    np.testing.assert_allclose(logits, np.exp(2.3) * vectors[0] @ vectors[1].T, atol=2e-4)
    assert not report["dropped"] and not report["initialised"]
    given_back(out, tmp_path, params)


def class_logits(recorded, heads):
    mean = recorded["image/layers"][-1][:, 1:].mean(1)
    normed = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-5)
    normed = normed * heads["fc_norm.weight"] + heads["fc_norm.bias"]
    return (normed @ heads["head.weight"].T + heads["head.bias"]).astype(np.float32)


@pytest.mark.parametrize("texts", [False, True])
def test_classifier_of_images(texts, tmp_path, recorded):
    """ImageNet's has no final norm; parameters of texts, if there are any, are of no use to it."""
    params = {k: v for k, v in encoder(recorded).items() if "encoder.layer_norm" not in k}
    if not texts:
        params = {k: v for k, v in params.items() if ".B." not in k and "text_embed" not in k}
    params |= classifier()
    out, report = converted(tmp_path, params)
    loaded = bivl.load(out)
    assert_layers(loaded, recorded, "image", last=False)
    close(loaded.predict["logits"](inputs(recorded, "image")), class_logits(recorded, params))
    reasons = {row["reason"] for row in report["dropped"]}
    assert reasons == ({"the classifier reads images alone"} if texts else set())
    given_back(out, tmp_path, params)


def test_image_branch_of_timm(tmp_path, recorded):
    """Its own names: q, k and v as one, no rows that nothing reads, no mask token."""
    theirs, params = encoder(recorded), classifier()
    get = lambda name: theirs[f"beit3.{name}"]  # noqa: E731
    params |= {f"patch_embed.proj.{part}": get(f"vision_embed.proj.{part}") for part in _PARTS}
    params["cls_token"] = get("vision_embed.cls_token")
    params["pos_embed"] = get("encoder.embed_positions.A.weight")[None, 2:]
    names = {
        "norm1": "self_attn_layer_norm.A",
        "attn.norm": "self_attn.inner_attn_ln.A",
        "attn.proj": "self_attn.out_proj.A",
        "norm2": "final_layer_norm.A",
        "mlp.fc1": "ffn.A.fc1",
        "mlp.norm": "ffn.A.ffn_layernorm",
        "mlp.fc2": "ffn.A.fc2",
    }
    for i in range(3):
        for part in _PARTS:
            layer, block = f"encoder.layers.{i}", f"blocks.{i}"
            qkv = [get(f"{layer}.self_attn.{p}_proj.A.{part}") for p in "qkv"]
            params[f"{block}.attn.qkv.{part}"] = np.concatenate(qkv)
            for ours, official in names.items():
                params[f"{block}.{ours}.{part}"] = get(f"{layer}.{official}.{part}")
    out, report = converted(tmp_path, params)
    loaded = bivl.load(out)
    assert_layers(loaded, recorded, "image", last=False)
    close(loaded.predict["logits"](inputs(recorded, "image")), class_logits(recorded, params))
    assert [row["path"] for row in report["initialised"]] == ["embed/mask_token/value"]


_PARTS = ("weight", "bias")


def answer_heads(task, answers=7):
    """The heads of VQA or NLVR2, pooler included."""
    wide, widest = 2 * WIDTH, 4 * WIDTH
    if task == "vqa":
        return drawn(
            pooler__norm__weight=(WIDTH,),
            pooler__norm__bias=(WIDTH,),
            pooler__dense__weight=(WIDTH, WIDTH),
            pooler__dense__bias=(WIDTH,),
            head__0__weight=(wide, WIDTH),
            head__0__bias=(wide,),
            head__1__weight=(wide,),
            head__1__bias=(wide,),
            head__3__weight=(answers, wide),
            head__3__bias=(answers,),
        )
    return drawn(
        head__norm1__weight=(widest,),
        head__norm1__bias=(widest,),
        head__dense1__weight=(wide, widest),
        head__dense1__bias=(wide,),
        head__norm2__weight=(wide,),
        head__norm2__bias=(wide,),
        head__dense2__weight=(2, wide),
        head__dense2__bias=(2,),
    )


def told(x, params, *names):
    """What modules of these names make of x [B, D], in float64: of one axis they are norms, before
    the last map stands GELU."""
    for name in names:
        weight, bias = (params[f"{name}.{part}"] for part in _PARTS)
        if weight.ndim == 1:
            x = np.stack([image_texts.normalized(row, -1) for row in x]) * weight + bias
            continue
        x = image_texts.gelu(x) if name == names[-1] and len(names) > 2 else x
        x = x @ weight.T + bias
    return x


@pytest.mark.parametrize("norm", [False, True])
def test_answers_to_questions(norm, tmp_path, recorded):
    """VQA reads CLS before any final norm, which a file may have and nothing applies."""
    params = encoder(recorded) | answer_heads("vqa")
    if not norm:
        params = {k: v for k, v in params.items() if "encoder.layer_norm" not in k}
    out, report = converted(tmp_path, params, write=torch_zip)
    loaded = bivl.load(out)
    got = assert_layers(loaded, recorded, "pair", last=False)
    pooled = np.tanh(told(np.asarray(got["pooled"]), params, "pooler.norm", "pooler.dense"))
    wanted = told(pooled, params, "head.0", "head.1", "head.3")
    logits = loaded.predict["logits"](inputs(recorded, "image", "tokens"))
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert loaded.config.num_classes == 7 and loaded.config.objective == "vqa"
    assert not report["initialised"] and {row["reason"] for row in report["dropped"]} == (
        {"the head has a norm of its own"} if norm else set()
    )
    given_back(out, tmp_path, params)


def test_truths_of_statements(tmp_path, recorded):
    """NLVR2 reads CLS and `<s>` of both images; heads of pre-training are said to be dropped."""
    params = encoder(recorded) | answer_heads("nlvr2") | masked_heads()
    out, report = converted(tmp_path, params)
    loaded, halves = bivl.load(out), []
    assert_layers(loaded, recorded, "pair")
    batch = inputs(recorded, "image", "tokens")
    for image in (batch["image"], batch["image"][::-1]):
        x = np.asarray(loaded.encode(batch | {"image": image})["tokens"])
        halves += [x[:, 0], x[:, 10]]  # behind CLS and nine patches
    wanted = told(np.concatenate(halves, -1), params, *(f"head.{n}" for n in _COMPARED))
    logits = loaded.predict["logits"](batch | {"image2": batch["image"][::-1]})
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    dropped = {row["key"]: row["reason"] for row in report["dropped"]}
    assert dropped == dict.fromkeys(masked_heads(), "the model is tuned to answer")
    given_back(out, tmp_path, params)


_COMPARED = ("norm1", "dense1", "norm2", "dense2")


def test_captions(tmp_path, recorded):
    """Their head is that of masked words."""
    params = encoder(recorded) | {k: v for k, v in masked_heads().items() if "mlm" in k}
    out, report = converted(tmp_path, params, write=torch_zip)
    loaded = bivl.load(out)
    assert_layers(loaded, recorded, "pair")
    assert not report["dropped"] and set(loaded.params["heads"]) == {"mlm_head"}
    given_back(out, tmp_path, params)


@pytest.mark.parametrize(
    ("task", "key"),
    [("vqa", "head.1.bias"), ("vqa", "head.3.weight"), ("nlvr2", "head.norm2.bias")],
)
def test_heads_are_whole(task, key, tmp_path, recorded):
    params = encoder(recorded) | answer_heads(task)
    del params[key]
    with pytest.raises(UserError, match=f"no {key}|{key} is missing"):
        converted(tmp_path, params)
    assert not (tmp_path / "ours").exists()


def test_tables_of_positions_are_resized_as_pytorch_does():
    with np.load(Path(beit3_tree.FILE).with_name("positions.npz")) as file:
        arrays = dict(file)
    table, positions = arrays.pop("table"), TRANSFORMS["positions"]
    for wanted in arrays.values():
        assert positions.fits(table.shape, wanted.shape)
        got = positions.ours(table, wanted.shape)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(got[:3], table[:3])
    assert positions.ours(table, table.shape) is table
    for other in ((3 + 8, 5), (3 + 4, 6), (2, 5), (3, 5)):
        assert not positions.fits(table.shape, other)


def test_another_image_size(tmp_path, recorded):
    params = encoder(recorded) | classifier()
    out, _ = converted(tmp_path, params, "--config.image_size=20")
    loaded = bivl.load(out)
    table = np.asarray(loaded.params["embed"]["image_positions"]["value"])
    theirs = params["beit3.encoder.embed_positions.A.weight"]
    assert table.shape == (3 + 25, WIDTH)
    np.testing.assert_array_equal(table[:3], theirs[:3])
    np.testing.assert_allclose(table, TRANSFORMS["positions"].ours(theirs, table.shape), atol=1e-6)
    logits = loaded.predict["logits"]({"image": np.zeros((1, 20, 20, 3), np.float32)})
    assert logits.shape == (1, 5)


def test_the_tokenizer_beside_the_file(tmp_path, recorded):
    """It goes along; without one the model takes ids alone, and says so."""
    params = encoder(recorded)
    words = np.random.default_rng(0).standard_normal((8204, WIDTH)).astype(np.float32)
    shutil.copy(PIECES, tmp_path / "beit3.spm")
    with pytest.raises(UserError, match=r"beit3.spm has 8192 ids, the model 50"):
        converted(tmp_path, params)
    params["beit3.text_embed.weight"] = words
    out, _ = converted(tmp_path, params)
    (tmp_path / "beit3.spm").unlink()
    loaded = bivl.load(out)
    assert loaded.config.tokenizer.path == str(out / "source" / "beit3.spm")
    batch = loaded.preprocess(text=["a word", "three more words"])
    tokenizer = tokenizers.load({"kind": "small_xlmr"})
    np.testing.assert_array_equal(
        batch["tokens"][0][~batch["padding"][0]], [0, *tokenizer.encode("a word"), 2]
    )
    assert loaded.encode(batch)["tokens"].shape == (*batch["tokens"].shape, WIDTH)


def test_without_a_tokenizer(tmp_path, recorded, caplog):
    out, _ = converted(tmp_path, encoder(recorded))
    assert "no beit3.spm lies beside the weights" in caplog.text
    with pytest.raises(UserError, match="tokenizer.kind=ids"):
        bivl.load(out).preprocess(text=["a word"])


LAYER = "beit3.encoder.layers.1."


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (f"{LAYER}ffn.B.fc2.bias", None, "fc2.bias is missing, for trunk/text_blocks/mlp/fc2/bias"),
        (f"{LAYER}ffn.A.fc2.weight", np.ones((24, 41), "f"), "has shape (24, 41)"),
        (f"{LAYER}ffn.C.fc2.bias", np.ones(24, "f"), "ffn.C.fc2.bias is not used"),
        ("mlm_head.bias", np.ones(51, "f"), "mlm_head.bias has shape (51,)"),
        ("logit_scale", np.float32(1), "logit_scale is not used"),
        ("beit3.encoder.embed_positions.A.weight", np.ones((13, 24), "f"), "no square grid"),
        ("beit3.text_embed.weight", np.full((50, 24), np.nan, "f"), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key, value, said, tmp_path, recorded):
    params = encoder(recorded) | masked_heads()
    params.pop(key, None)
    params |= {} if value is None else {key: value}
    with pytest.raises(UserError) as caught:
        converted(tmp_path, params)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_heads_that_the_width_does_not_tell_are_asked_for(tmp_path, recorded):
    np.savez(tmp_path / "theirs.npz", **encoder(recorded))
    with pytest.raises(UserError, match=r"--config.model.num_heads=\.\.\."):
        convert.main([f"--source={tmp_path}/theirs.npz", f"--out={tmp_path}/ours"])


def test_pairs_are_seen_whole(tmp_path, recorded):
    """Squashed to a square, as the code that tuned these models does, and nothing is cut off."""
    out, _ = converted(tmp_path, encoder(recorded))
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    got = bivl.load(out).preprocess(image=[image])["image"][0]
    wanted = np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(got, wanted / 127.5 - 1, atol=1e-6)
