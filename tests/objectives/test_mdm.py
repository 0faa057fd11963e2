"""Masked data modeling against plain computations from the encoder's outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import image_texts
from bivl.core.errors import UserError
from bivl.objectives import frozen, mdm, streams

WEIGHTS = {"images": 1.0, "texts": 0.5, "pairs_image": 2.0, "pairs_text": 0.25}
CONFIG = "configs/pretrain/beit3.py:smoke"
pytestmark = pytest.mark.usefixtures("quick_compile")


def config(**changes):
    c = image_texts.config(CONFIG, image_texts.MDM, **changes)
    if not changes:
        c.loss_weights.update(WEIGHTS)
    return c


def only(**weights):
    """The config with the other losses off."""
    c = config(pair__corrupt="both")
    c.loss_weights.update(dict.fromkeys(WEIGHTS, 0.0) | weights)
    return c


@functools.cache
def objective():
    return mdm.make(config())


@functools.cache
def trees():
    return image_texts.created(objective())


@functools.cache
def whole():
    """Metrics and gradients of a step in one batch."""
    return image_texts.accumulated(objective(), trees(), image_texts.batch(), 1)


@functools.cache
def encoded():
    """Outputs of the encoder for the masked streams, and codes of whole images, by part."""
    setup = streams.open_streams(config())
    model = setup.model(streams.HeadsConfig(), "float32")
    tokenizer = frozen.open(config())

    def run(trees, batch):
        params, teacher, _ = trees
        params = {name: params[name] for name in ("embed", "trunk")}
        tokens, codes = {}, {}
        for part, x in batch.items():
            options = {"method": "encode"}
            tokens[part] = model.apply({"params": params}, x, True, **options)[1].tokens
            if "image" in x:
                codes[part] = tokenizer.tell("codes", teacher, {"image": x["image"]})
        return tokens, codes

    return jax.tree.map(np.asarray, jax.jit(run)(trees(), image_texts.batch()))


def test_losses_are_cross_entropies_at_masked_places():
    (metrics, _), (tokens, codes), batch = whole(), encoded(), image_texts.batch()
    heads, total = trees()[0]["heads"], 0.0
    for name, part in image_texts.PARTS.items():
        x, given = tokens[part], batch[part]
        if name in ("images", "pairs_image"):
            logits = image_texts.linear(x[:, 1:17], heads["mim_head"])
            classes, mask = codes[part], np.asarray(given["mask"])
        else:
            logits = image_texts.linear(x[:, -given["tokens"].shape[1] :], heads["mlm_head"])
            classes, mask = np.asarray(given["tokens"]), np.asarray(given["text_mask"])
        loss, right, commonest = image_texts.token_loss(logits, classes, mask)
        np.testing.assert_allclose(metrics[f"token_loss/{name}"], loss, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(metrics[f"token_accuracy/{name}"], right, atol=1e-6)
        np.testing.assert_allclose(metrics[f"most_frequent/{name}"], commonest, rtol=1e-5)
        total += WEIGHTS[name] * loss
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    assert len(np.unique(codes["images"])) > 3


def test_accumulation_changes_nothing():
    (metrics, grads), (found, others) = (
        whole(),
        image_texts.accumulated(objective(), trees(), image_texts.batch(), 2),
    )
    for name, value in metrics.items():
        if not name.startswith("most_frequent"):  # the commonest of half a batch is another
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), others, grads)


def test_all_streams_move_all_parameters():
    found = image_texts.moved(whole()[1])
    modalities = {
        f"trunk/{name}_{part}" for name in ("image", "text") for part in ("blocks", "norm")
    }
    embed = "patch words cls_token mask_token image_positions text_positions"
    assert found == modalities | {f"embed/{name}" for name in embed.split()} | {
        "heads/mim_head",
        "heads/mlm_head",
    }


def test_texts_alone_need_no_tokenizer():
    c = only(texts=1.0)
    c.teacher.random = False
    made = mdm.make(c)
    params, teacher, extras = image_texts.created(made)
    assert teacher == extras == {} and not made.frozen and set(params["heads"]) == {"mlm_head"}
    metrics, grads = image_texts.accumulated(made, (params, {}, {}), image_texts.batch(), 1)
    assert image_texts.moved(grads) == {
        "embed/words", "embed/text_positions", "trunk/text_blocks", "trunk/text_norm",
        "heads/mlm_head",
    }  # fmt: skip
    assert metrics["loss"] == metrics["token_loss/texts"]


def test_a_part_of_weight_0_is_not_there():
    c = only(images=1.0)
    c.data.texts.weight = c.data.pairs.weight = 0
    made = mdm.make(c)
    assert set(made.spec) == {"images"} and made.spec["images"]["image"].shape == (12, 16, 16, 3)
    params, teacher, _ = image_texts.created(made)
    assert set(params["heads"]) == {"mim_head"} and set(teacher) == {"teacher"}
    batch = {"images": image_texts.batch()["images"]}
    _, grads = image_texts.accumulated(made, (params, teacher, {}), batch, 1)
    assert image_texts.moved(grads) == {
        "embed/patch", "embed/cls_token", "embed/mask_token", "embed/image_positions",
        "trunk/image_blocks", "trunk/image_norm", "heads/mim_head",
    }  # fmt: skip


def test_the_tokenizer_sees_images_at_its_own_size():
    """Twice as large, in patches twice as large: as many codes."""
    c = only(images=1.0)
    for theirs in (c.teacher.config, c.teacher.config.teacher.config):
        theirs.image_size, theirs.model.patch_size = 32, 8
    made, tokenizer = mdm.make(c), frozen.open(c)
    _, teacher, _ = image_texts.created(made)
    batch = image_texts.batch()
    large = jax.image.resize(batch["images"]["image"].astype(float), (4, 32, 32, 3), "bicubic")
    large = jnp.clip(jnp.round(large), 0, 255).astype(jnp.uint8)
    codes = made.targets({}, teacher, {}, batch, None)["images"]
    assert codes.shape == (4, 16) and len(np.unique(codes)) >= 3
    np.testing.assert_array_equal(codes, tokenizer.tell("codes", teacher, {"image": large}))


def test_the_tokenizer_never_changes():
    teacher = {"teacher": {"params": {"x": jnp.ones(3)}}}
    assert objective().update(teacher, {}, {}, {}, 1)[0] == teacher
    c = config(teacher__random=False, teacher__checkpoint="somewhere")
    assert mdm.make(c).frozen == {"teacher": "somewhere"} and not objective().frozen


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"teacher__random": False},
            "config.teacher.checkpoint is empty; name a checkpoint of a t",
        ),
        ({"loss_weights": dict.fromkeys(WEIGHTS, 0.0)}, "config.loss_weights of images, .* all 0"),
        ({"modality": "image"}, "config.modality='image' is unknown; use one of"),
        ({"batch_size": 13}, "config.data.images.weight=1 of 3 gives 4.33"),
        ({"model__patch_size": 8}, "config.image_size=16 makes"),
        (
            {"teacher__config__objective": "beit3"},
            "config.teacher.config.objective='beit3' is unkn",
        ),
        ({"text__length": 40}, "config.text.length=40 must lie"),
        ({"text__masking__kind": "random"}, "config.text.masking.kind='random' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        mdm.make(config(**changes))
    assert "\n" not in str(caught.value)


def test_one_set_of_data_is_refused():
    c = config()
    with c.unlocked():
        c.data = c.data.pairs
    with pytest.raises(UserError, match="config.data must have the parts images, texts or pairs"):
        mdm.make(c)
