"""The multiway encoder: recorded numbers of BEiT-3, sizes, and which parameters serve what."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.modalities import image_text
from bivl.models.image_text import HeadsConfig
from bivl.models.multiway import Multiway, MultiwayConfig, split_modalities
from bivl.models.transformer import Tokens, init_blocks
from bivl.objectives.streams import ImageText
from golden import beit3_tree

G = beit3_tree.load()
SIZES = {"width": 24, "depth": 3, "num_heads": 3, "mlp_dim": 40}
CALLS = {
    "image": ("image",),
    "image_masked": ("image", "masked"),
    "text": ("tokens",),
    "pair": ("image", "tokens"),
    "pair_masked": ("image", "tokens", "masked"),
    "caption": ("image", "tokens", "blocked"),
}
KEY = jax.random.key(0, impl="rbg")
pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def recorded():
    """{call: (layers, tokens, valid)} of our model with the recorded parameters."""
    get = lambda name: G[f"params/beit3.{name}"]  # noqa: E731
    params = jax.tree.map(jnp.asarray, beit3_tree.tree(get, 3, 3))
    model = beit3_tree.model(**SIZES, image_size=12, patch_size=4, vocabulary=50)
    shapes = jax.eval_shape(model.init, KEY, {"image": G["image"], "tokens": G["tokens"]})["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(shapes))

    def run(params):
        return {
            name: beit3_tree.call(model, params, **{k: G[k] for k in given})
            for name, given in CALLS.items()
        }

    return jax.tree.map(np.asarray, jax.jit(run)(params))


@pytest.mark.parametrize("name", CALLS)
def test_every_layer_is_the_recorded_one(name):
    layers, tokens, valid = recorded()[name]
    assert valid.sum() == {"image": 20, "text": 13}.get(name.split("_")[0], 33)
    wanted = G[f"{name}/layers"]
    assert layers.shape == wanted.shape == (4, *tokens.shape)
    np.testing.assert_allclose(layers[:, valid], wanted[:, valid], rtol=0, atol=beit3_tree.CLOSE)
    np.testing.assert_allclose(
        tokens[valid], G[f"{name}/tokens"][valid], rtol=0, atol=beit3_tree.CLOSE
    )


def test_the_caption_mask_hides_texts_from_images():
    """And only that: an image in a captioning call is what it is alone."""
    np.testing.assert_allclose(
        recorded()["caption"][1][:, :10], recorded()["image"][1], rtol=0, atol=1e-5
    )
    assert np.abs(recorded()["pair"][1][:, :10] - recorded()["image"][1]).max() > 0.1


# Sizes


def shapes(spec, heading, **changes):
    """Shapes of a shipped config's parameters; nothing is computed."""
    c = configs.load(f"configs/pretrain/beit3.py:{spec}")
    c.tokenizer.kind = "bytes"  # its files are not shipped; the table has 64,010 rows all the same
    c.model.update(changes)
    embed = image_text.make_embed(c, "float32")
    encoder = MultiwayConfig.of(c.model, "float32")
    model = ImageText(embed, encoder, heading(c.model.width), image_text.grid(c))
    batch = {"image": jnp.zeros((1, 224, 224, 3), jnp.uint8), "tokens": jnp.zeros((1, 8), int)}
    return nn.unbox(jax.eval_shape(model.init, KEY, batch)["params"])


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


HEADINGS = {
    "none": lambda width: HeadsConfig(),
    "masked": lambda width: HeadsConfig(codes=8192, words=64_010),
    "contrast": lambda width: HeadsConfig(contrast=width),
}
TOTALS = {
    "base": {"none": 220_987_392, "masked": 276_510_730, "contrast": 222_167_041},
    "large": {"none": 672_702_464, "masked": 746_709_514, "contrast": 674_799_617},
    "giant": {"none": 2_113_992_704, "masked": 2_215_725_322},
}


@pytest.mark.parametrize(
    ("size", "heading"), [(size, heading) for size in TOTALS for heading in TOTALS[size]]
)
def test_parameters_of_the_published_models(size, heading):
    assert count(shapes(f"size={size}", HEADINGS[heading])) == TOTALS[size][heading]


@pytest.mark.parametrize("norm", ["sub", "pre"])
def test_parameters_of_the_papers_layout(norm):
    """Attention once a layer, FFNs for images and texts in all layers, for pairs in the top 3."""
    D, F, L, top = 1408, 6144, 40, 3
    attention = 4 * (D * D + D) + 2 * D + 2 * D * (norm == "sub")
    ffn = 2 * D * F + F + D + 2 * D + 2 * F * (norm == "sub")
    embedding = 64_010 * D + 3 * 14 * 14 * D + D + 2 * D + (256 + 3) * D + 1024 * D
    found = shapes("size=giant", HEADINGS["none"], experts="shared", pair_layers=top, norm=norm)
    assert count(found) == L * attention + (2 * L + top) * ffn + embedding + 4 * D
    assert round(count(found) / 1e9, 2) == 1.85
    assert found["trunk"]["pair_experts"]["mlp"]["fc1"]["kernel"].shape == (top, D, F)


# Which parameters serve what


def config(**changes):
    return MultiwayConfig(
        **{"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24, "norm": "sub", "scan": True}
        | changes
    )


def given(images=5, texts=4, rows=2):
    """Random tokens of images and texts [B, L, D] with the last of the first text padded."""
    x = np.random.default_rng(7).standard_normal((rows, images + texts, 16)).astype(np.float32)
    padding = np.zeros((rows, images + texts), bool)
    padding[0, -1] = bool(texts)
    return x, padding


@functools.cache
def created(c):
    """Parameters that are nowhere what they start as."""
    x, padding = given()
    tokens = Tokens(jnp.asarray(x), 1, None, jnp.asarray(padding), 5)
    tree = nn.unbox(jax.eval_shape(lambda: Multiway(c).init(KEY, tokens)["params"]))
    rng = np.random.default_rng(5)

    def leaf(path, x):
        return jnp.asarray(0.3 * rng.standard_normal(x.shape) + (path[-1].key == "scale"), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def outputs(c, params, images=5, texts=4, key=None, collect=()):
    """Multiway's outputs of `given`; with a key as in training."""
    x, padding = given(images, texts)
    tokens = Tokens(jnp.asarray(x), int(images > 0), None, jnp.asarray(padding), images)
    options = {"rngs": {"dropout": key}} if key is not None else {}
    return Multiway(c).apply({"params": params}, tokens, key is None, collect, **options)


def moved(c, params, **what):
    """{path: largest gradient in each layer of what a call gives}."""

    def value(params):
        x = outputs(c, params, **what).tokens
        return (x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum()

    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(value))(params))[0]:
        stacked = path[0].key.endswith(("blocks", "experts"))
        found["/".join(key.key for key in path)] = np.abs(x).max(tuple(range(stacked, x.ndim)))
    return found


ALONE = {"image": {"texts": 0}, "text": {"images": 0}}


@pytest.mark.parametrize(("name", "other"), [("image", "text"), ("text", "image")])
def test_one_modality_moves_its_own_parameters_alone(name, other):
    c = config(depth=2)
    for path, sizes in moved(c, created(c), **ALONE[name]).items():
        if path.startswith(other):
            assert not sizes.any(), path
        elif not path.endswith("k_bias/value"):  # which moves nothing but rounding
            assert sizes.all(), path


def test_a_pair_moves_both():
    c = config(depth=2)
    found = moved(c, created(c))
    assert all(x.all() for path, x in found.items() if not path.endswith("k_bias/value"))


def test_the_embedding_of_one_modality_moves_alone():
    model = beit3_tree.model(16, 1, 2, 24, 12, 4, 50)
    batch = {"image": G["image"], "tokens": G["tokens"]}
    shapes = nn.unbox(jax.eval_shape(model.init, KEY, batch)["params"])
    params = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape), shapes)

    @jax.jit
    def gradients(params):
        def value(params, only):
            return jnp.sin(model.apply({"params": params}, only, method="encode")[1].tokens).sum()

        return {name: jax.grad(value)(params, {name: x})["embed"] for name, x in batch.items()}

    found = {
        name: {key for key, part in tree.items() if any(x.any() for x in jax.tree.leaves(part))}
        for name, tree in gradients(params).items()
    }
    assert found == {
        "image": {"patch", "cls_token", "image_positions"},
        "tokens": {"words", "text_positions"},
    }


@pytest.mark.parametrize("top", [0, 1, 3])
def test_the_experts_of_pairs_are_used_where_both_are_present(top):
    """And there in place of the experts of images and texts; attention is shared everywhere."""
    c = config(experts="shared", pair_layers=top)
    params, below = created(c), 3 - top
    for name in ALONE if top == 1 else ():
        for path, sizes in moved(c, params, **ALONE[name]).items():
            used = path.startswith((f"{name}_", "shared"))
            assert sizes.all() == sizes.any() == used or path.endswith("k_bias/value"), path
    for path, sizes in moved(c, params).items():
        if path.startswith(("image_blocks", "text_blocks")):
            np.testing.assert_array_equal(sizes > 0, np.arange(3) < below, err_msg=path)
        else:
            assert sizes.all() or path.endswith("k_bias/value"), path
    assert ("pair_experts" in params) == bool(top)


def test_shared_attention_is_one_encoder_where_the_experts_are_alike():
    """An encoder of one modality with the same parameters: the parts are put together rightly."""
    c = config(experts="shared")
    params = dict(created(c))
    params["text_blocks"], params["text_norm"] = params["image_blocks"], params["image_norm"]
    x, padding = given()

    def run(params, images):
        tokens = Tokens(jnp.asarray(x), 1, None, jnp.asarray(padding), images)
        return Multiway(c).apply({"params": params}, tokens, True, ("layers", "ffn", "weights"))

    mixed, plain = jax.jit(lambda params: (run(params, 5), run(params, 9)))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), mixed, plain)
    assert np.array(mixed.weights[0]).shape == (2, 2, 9, 9)
    assert not np.array(mixed.weights[0])[0, :, :, -1].any()  # a pad is not looked at


def test_scan_and_remat_change_nothing():
    rates = {"drop_path": 0.3, "dropout": 0.1, "attention_dropout": 0.1}
    c = config(experts="shared", pair_layers=1, **rates)
    params, results = created(c), []
    for scan, remat in ((False, "none"), (True, "full")):
        c = dataclasses.replace(c, scan=scan, remat=remat)

        @jax.jit
        def both(params, c=c):
            def value(params):
                out = outputs(c, params, key=jax.random.key(3), collect=("layers", "ffn"))
                return jnp.sin(out.tokens).sum(), out

            return jax.value_and_grad(value, has_aux=True)(params)

        results.append(both(params))
        assert len(results[-1][0][1].layers) == 4 and len(results[-1][0][1].ffn) == 3
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, *results)


def test_drop_path_drops_both_parts_of_an_example_together():
    c = config(depth=2, drop_path=0.5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 9, 16)), jnp.float32)

    def run(params, key):
        tokens, collect = Tokens(x, 1, images=5), ("layers", "ffn")
        options = {"rngs": {"dropout": key}}
        return Multiway(c).apply({"params": params}, tokens, False, collect, **options)

    out = jax.jit(run)(created(c), jax.random.key(1))
    grown, ffn = out.layers[2] - out.layers[1], 2 * out.ffn[1]  # survivors are doubled
    found = []
    for part in (slice(0, 5), slice(5, 9)):
        far = [np.abs(np.asarray(x[:, part])).max((1, 2)) > 1e-4 for x in (grown, grown - ffn, ffn)]
        assert far[2].all()
        # Nothing was added, the FFN alone was, or attention too.
        found.append(np.stack([~far[0], ~far[1]]))
    np.testing.assert_array_equal(*found)
    assert (found[0].sum(1) > 5).all() and found[0].sum() < 50
    first = np.abs(out.layers[1] - out.layers[0]).max((1, 2))
    assert first.min() > 1e-3  # the rate of the first layer is 0


# What parameters start as


@functools.cache
def started(init):
    """Fresh parameters of 12 layers."""
    c = config(init=init, depth=12)
    return jax.tree.map(np.asarray, jax.jit(lambda key: nn.unbox(init_blocks(c, key)))(KEY))


def kernels(blocks):
    """{name: kernels [N, ...]}; those of q, k and v apart."""
    fused = blocks["attention"]["qkv"]["kernel"]
    found = {name: fused[:, :, i] for i, name in enumerate("qkv")}
    found |= {"out": blocks["attention"]["out"]["kernel"]}
    return found | {name: blocks["mlp"][name]["kernel"] for name in ("fc1", "fc2")}


def test_the_gains_of_scratch_and_magneto():
    """sqrt(ln 24) = 1.7827 times the values, attention's last matrix and the FFN; q, k as drawn."""
    for name, kernel in kernels(started("scratch")).items():
        gain = 1 if name in "qk" else 1.7827
        top = np.abs(kernel).max()
        assert 0.97 * 0.04 * gain < top <= 0.0401 * gain, name  # cut at two stds
        np.testing.assert_allclose(kernel.std(), 0.0176 * gain, rtol=0.03, err_msg=name)
    blocks = started("magneto")
    for name, kernel in kernels(blocks).items():
        sizes = 16 + (24 if "fc" in name else 16)
        bound = math.sqrt(6 / sizes) * (1 if name in "qk" else 1.7827)
        top = np.abs(kernel).max()
        assert 0.98 * bound < top <= bound * 1.0001, name
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05, err_msg=name)
    for name in ("q_bias", "k_bias", "v_bias"):
        assert not blocks["attention"][name]["value"].any()


def test_beits_rule_divides_the_last_matrices_by_the_depth():
    plain, scaled = kernels(started("truncated")), kernels(started("beit"))
    for name, kernel in scaled.items():
        by = np.sqrt(2 * np.arange(1, 13)) if name in ("out", "fc2") else np.ones(12)
        np.testing.assert_allclose((kernel.T * by).T, plain[name], rtol=2e-5, err_msg=name)
    assert np.abs(plain["fc1"]).max() <= 0.02 and 0.0100 < plain["fc1"].std() < 0.0116


@pytest.mark.parametrize("kind", ["scratch", "magneto", "beit"])
def test_what_the_embedding_starts_as(kind):
    made = image_text.token_inits(kind, 64, 3 * 16)
    x = {name: np.asarray(init(KEY, (4, 4, 50, 64))) for name, init in made.items()}
    small = {"scratch": (0.0176, 0.04), "beit": (0.0108, 0.02)}.get(kind)  # std, largest
    stds = {name: (small or (0.0,))[0] for name in x} | {"patch_bias": 0.0}
    if kind == "magneto":
        uniform = (3 * 16 * 3) ** -0.5
        stds = {"patch": uniform, "patch_bias": uniform, "words": 1 / 8, "special": 0.0}
        stds["positions"] = 1.0
    for name, value in x.items():
        np.testing.assert_allclose(value.std(), stds[name], rtol=0.02, err_msg=name)
        if small:
            assert np.abs(value).max() <= small[1], name
    if kind == "magneto":
        assert np.abs(x["patch"]).max() <= 48**-0.5 and np.abs(x["positions"]).max() > 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": "single"}, "config.model.experts='single' is unknown"),
        ({"pair_layers": 1}, "config.model.pair_layers=1 must lie between 0 and"),
        ({"experts": "shared", "pair_layers": 4}, "config.model.pair_layers=4 must lie between"),
        ({"input_norm": True}, "config.model.input_norm and layer_drop are not for"),
        ({"layer_drop": 0.1}, "config.model.input_norm and layer_drop are not for"),
        ({"num_heads": 3}, "config.model.width=16 is not a multiple of"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_parts_without_tokens_are_left_out():
    x = np.zeros((1, 4, 2))
    found = {images: {k: v.shape[1] for k, v in split_modalities(x, images).items()} for images in
             (0, 1, 4)}  # fmt: skip
    assert found == {0: {"text": 4}, 1: {"image": 1, "text": 3}, 4: {"image": 4}}
