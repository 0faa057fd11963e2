"""The flagship against plain computations from what the encoder makes of its inputs."""

import functools

import jax
import numpy as np
import pytest

import image_texts
from bivl.core import ema
from bivl.core.errors import UserError
from bivl.models.image_text import HeadsConfig
from bivl.objectives import bivl, contrastive, streams

CONFIG = "configs/pretrain/bivl.py:smoke"
WEIGHTS = {"images": 1.0, "texts": 0.5, "pairs_image": 2.0, "pairs_text": 0.25}
TOKEN_WEIGHTS = {"images": 0.0, "texts": 0.75, "pairs_image": 0.0, "pairs_text": 1.5}
NOTHING = dict.fromkeys(WEIGHTS, 0.0)
CALM = {"decoder.noise": 0.0, "decoder.width": 8, "decoder.depth": 1, "decoder.groups": 2}
CONTRAST = {"image": ("image", "mask"), "text": ("tokens", "inputs")}
pytestmark = pytest.mark.usefixtures("quick_compile")


def config(**changes):
    weights = {f"loss_weights.{name}": weight for name, weight in WEIGHTS.items()}
    weights |= {f"token_weights.{name}": weight for name, weight in TOKEN_WEIGHTS.items()}
    return image_texts.config(CONFIG, image_texts.BIVL | CALM | weights, **changes)


CASES = {
    "joint": {"contrast.weight": 0.3},
    "apart": {  # and clones that lack masked patches; other norms, layers and distances
        "contrast.weight": 0.0,
        "masking": image_texts.CLONES,
        "mask_ratio": 0.5,
        "target.pairs": "apart",
        "target.layer": "ffn",
        "target.text.layer_norms": ("instance",),
        "target.text.norms": ("layer",),
        "loss.reduction": "sum",
        "top_k_layers": 1,
    },
}


@functools.cache
def objective(case):
    return bivl.make(config(**CASES[case]))


@functools.cache
def trees(case):
    """A teacher that is not the student."""
    params, teacher, extras = image_texts.created(objective(case))
    rng = np.random.default_rng(9)
    teacher = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype("f"), teacher)
    return params, teacher, extras


def batch(case):
    return image_texts.batch(2 if case == "apart" else 0)


@functools.cache
def whole(case):
    """Metrics and gradients of a step in one batch."""
    return image_texts.accumulated(objective(case), trees(case), batch(case), 1)


@functools.cache
def encoded(case):
    """{part: what the teacher's layers make of it whole}, {part: what the student's encoder makes
    of it masked}, {loss: the patches or words that the heads see}, vectors of contrast."""
    c = config(**CASES[case])
    heading = HeadsConfig(decoder=streams.decoding(c), contrast=8 if c.contrast.weight else 0)
    model = streams.open_streams(c).model(heading, "float32")

    def run(params, teacher, batch):
        used = ("decoder", "vision_head", "language_head", "logit_scale")
        heads = {name: x for name, x in params["heads"].items() if name in used}
        params = params | {"heads": heads}
        whole = ema.completed(teacher, params)

        def look(params, given, masked=False):
            options = {"collect": ("layers", "ffn"), "method": "encode"}
            return model.apply({"params": params}, given, masked, **options)[1]

        def fill(module, x, keep):
            return module.heads.fill(x, keep, False)

        taught, seen, vectors = {}, {}, {}
        for part, x in batch.items():
            inputs = {name: x[name] for name in ("image", "tokens") if name in x}
            if part != "pairs" or case == "joint":
                taught[part] = look(whole, inputs)
            for name, value in inputs.items() if part == "pairs" and case == "apart" else ():
                taught[name] = look(whole, {name: value})
            seen[part] = look(params, x, True).tokens
            if "keep" in x:
                patches, rngs = seen[part][:, 1:9], {"dropout": jax.random.key(0)}
                options = {"rngs": rngs, "method": fill}
                filled = model.apply({"params": params}, patches, x["keep"], **options)
                seen[part] = seen[part][:, :1], filled, seen[part][:, 9:]
        for name, names in CONTRAST.items() if c.contrast.weight else ():
            only = {k: batch["pairs"][k] for k in names}
            options = {"method": "embeddings"}
            masked = name in c.contrast.masked
            vectors[name] = model.apply({"params": params}, only, "mean", masked, **options)
        return taught, seen, vectors

    params, teacher, _ = trees(case)
    return jax.tree.map(np.asarray, jax.jit(run)(params, teacher, batch(case)))


def plain_target(layers, keep, layer_norms, norms):
    """Of one example: K arrays [L, D] and which tokens count -> [number that count, D]."""
    axes = {"layer": 1, "instance": 0}
    found = [x[keep].astype(np.float64) for x in layers]
    for norm in layer_norms:
        found = [image_texts.normalized(x, axes[norm]) for x in found]
    found = sum(found) / len(found)
    for norm in norms:
        found = image_texts.normalized(found, axes[norm])
    return found


def targets(case, part, modality):
    """[B, N or L, D], NaN at pads."""
    c, given = config(**CASES[case]), batch(case)[part]
    name = {"image": "image", "text": "tokens"}[modality]
    apart = part == "pairs" and c.target.pairs == "apart"
    out = encoded(case)[0][name if apart else part]
    layers = getattr(out, {"end": "layers", "ffn": "ffn"}[c.target.layer])[-c.top_k_layers :]
    start = 17 if modality == "text" and part == "pairs" and not apart else modality == "image"
    length = given["tokens"].shape[1] if modality == "text" else 16
    norms, found = c.target[modality], np.full((4, length, 16), np.nan)
    for row in range(4):
        real = np.asarray(given["tokens"][row]) != 1 if modality == "text" else np.ones(16, bool)
        tokens = [x[row, int(start) : int(start) + length] for x in layers]
        found[row, real] = plain_target(tokens, real, norms.layer_norms, norms.norms)
    return found


def predictions(case, part, modality):
    """What the regression and the words' head see, [R, N or L, D], and the head of regression."""
    x, heads = encoded(case)[1][part], trees(case)[0]["heads"]
    if case == "apart" and part != "texts":
        x = x[1] if modality == "image" else x[2]
    else:
        x = x[:, 1:17] if modality == "image" else x[:, 17 if part == "pairs" else 0 :]
    if modality == "text":
        hidden = image_texts.gelu(image_texts.linear(x, heads["text_regression"]["fc"]))
        return x, image_texts.linear(hidden, heads["text_regression"]["projection"])
    if case == "apart":
        return x, x
    return x, image_texts.linear(x, heads["image_regression"]["projection"])


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_plain_ones(case):
    metrics, c, total = whole(case)[0], config(**CASES[case]), 0.0
    for name, part in image_texts.PARTS.items():
        modality = "image" if name in ("images", "pairs_image") else "text"
        given, clones = batch(case)[part], 2 if case == "apart" and part != "texts" else 1
        x, prediction = predictions(case, part, modality)
        mask = np.asarray(given["mask" if modality == "image" else "text_mask"])
        mask = mask.reshape(-1, mask.shape[-1])
        mask = np.repeat(mask, len(x) // len(mask), 0)
        target = np.repeat(targets(case, part, modality), clones, 0)
        assert len(x) == len(target) == 4 * clones
        error = (prediction - target)[mask] ** 2
        loss = (error.mean(-1) if c.loss.reduction == "mean" else error.sum(-1) / 4).mean()
        np.testing.assert_allclose(metrics[f"regression_loss/{name}"], loss, rtol=2e-5)
        total += c.loss_weights[name] * loss
        if modality == "text":
            logits = image_texts.linear(x, trees(case)[0]["heads"]["mlm_head"])
            classes = np.repeat(np.asarray(given["tokens"]), clones, 0)
            loss, right, _ = image_texts.token_loss(logits, classes, mask)
            np.testing.assert_allclose(metrics[f"token_loss/{name}"], loss, rtol=2e-5)
            np.testing.assert_allclose(metrics[f"token_accuracy/{name}"], right, atol=1e-6)
            total += c.token_weights[name] * loss
        std = np.sqrt(target[mask].var(0, ddof=1) + 1e-6).mean()
        np.testing.assert_allclose(metrics[f"target_std/{name}"], std, rtol=1e-4)
        assert metrics["target_std"] <= metrics[f"target_std/{name}"]
        assert metrics["prediction_std"] <= metrics[f"prediction_std/{name}"]
    if c.contrast.weight:
        vectors, scale = encoded(case)[2], trees(case)[0]["heads"]["logit_scale"]["value"]
        loss = image_texts.info_nce(vectors["image"], vectors["text"], scale)
        np.testing.assert_allclose(metrics["contrast_loss"], loss, rtol=2e-5)
        total += c.contrast.weight * loss
    np.testing.assert_allclose(metrics["loss"], total, rtol=2e-5)


@pytest.mark.parametrize("masked", [("image", "text"), ("text",)])
def test_contrast_of_clones_is_that_of_the_first(masked):
    c = config(**CASES["apart"], contrast__masked=masked)
    c.contrast.weight = 0.3
    made, pairs = bivl.make(c), dict(batch("apart")["pairs"])
    params = image_texts.created(made)[0]
    model = streams.open_streams(c).model(HeadsConfig(contrast=8), "float32")
    used = ("vision_head", "language_head", "logit_scale")
    params = params | {"heads": {name: params["heads"][name] for name in used}}

    def run(params, pairs):
        found = contrastive.vectors(model, params, pairs, c, jax.random.key(0))
        first = pairs | {name: pairs[name][:, :1] for name in ("mask", "keep")}
        vectors = []
        for modality, names in contrastive.FIELDS.items():
            only = {name: first[name] for name in names}
            call = (only, "mean", modality in masked)
            vectors.append(model.apply({"params": params}, *call, method="embeddings"))
        return found, vectors

    found, vectors = jax.jit(run)(params, pairs)
    assert found[0].shape == (4, 8)
    for ours, expected in zip(found, vectors, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_joint_targets_hold_what_the_other_says():
    made, (params, teacher, _) = objective("joint"), trees("joint")
    given = batch("joint")
    pairs = given["pairs"] | {"tokens": given["pairs"]["tokens"][::-1]}

    def run(*parts):
        made_of = [{**given, "pairs": part} for part in parts]
        return [made.targets(params, teacher, {}, x, None)["values"] for x in made_of]

    ours, others = jax.jit(run)(given["pairs"], pairs)
    assert np.abs(ours["pairs_image"] - others["pairs_image"]).max((1, 2)).min() > 0.01
    np.testing.assert_array_equal(ours["images"], others["images"])


def test_accumulation_changes_nothing():
    metrics, grads = whole("apart")
    found, others = image_texts.accumulated(objective("apart"), trees("apart"), batch("apart"), 2)
    for name, value in metrics.items():
        if "loss" in name or "accuracy" in name:
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), others, grads)


def test_all_parameters_move_but_tokens_that_stand_for_nothing():
    embed = {"patch", "words", "cls_token", "mask_token", "image_positions", "text_positions"}
    trunk = {f"trunk/{name}_{part}" for name in ("image", "text") for part in ("blocks", "norm")}
    heads = {"text_regression", "mlm_head"}
    contrast = {"vision_head", "language_head", "logit_scale"}
    wanted = {
        "joint": (embed, heads | contrast | {"image_regression"}),
        "apart": (embed - {"mask_token"}, heads | {"decoder"}),
    }
    for case, (tokens, tops) in wanted.items():
        names = {f"embed/{name}" for name in tokens} | {f"heads/{name}" for name in tops}
        assert image_texts.moved(whole(case)[1]) == names | trunk, case
        assert set(trees(case)[0]["heads"]) == tops, case


def test_a_loss_moves_what_it_reads():
    c = config(contrast__weight=0.0, loss_weights=NOTHING | {"texts": 1.0}, token_weights=NOTHING)
    c.data.pairs.weight = 0
    made = bivl.make(c)
    given = {name: x for name, x in image_texts.batch().items() if name != "pairs"}
    metrics, grads = image_texts.accumulated(made, image_texts.created(made), given, 1)
    assert image_texts.moved(grads) == {
        "embed/words", "embed/text_positions", "trunk/text_blocks", "trunk/text_norm",
        "heads/text_regression",
    }  # fmt: skip
    assert metrics["loss"] == metrics["regression_loss/texts"] > 0
    assert set(made.spec) == {"images", "texts"}


def test_the_teacher_averages_all_but_the_heads():
    made, (params, teacher, _) = objective("joint"), trees("joint")
    assert set(teacher) == {"embed", "trunk"} and made.frozen == {}
    found, extras, metrics = jax.jit(made.update)(teacher, {}, params, {}, 5)
    c = config()
    tau = c.ema_decay_end - (c.ema_decay_end - c.ema_decay_start) * (1 - 5 / c.ema_anneal_steps)
    np.testing.assert_allclose(metrics["ema_decay"], tau, rtol=1e-6)
    for old, new, student in zip(
        *map(jax.tree.leaves, (teacher, found, ema.held(params, teacher))), strict=True
    ):
        np.testing.assert_allclose(new, tau * old + (1 - tau) * student, atol=1e-6)
    assert extras == {} and "teacher_distance/embed" in metrics


def test_shared_parameters_are_the_students():
    made = bivl.make(config(ema_shared=("embed/words", "trunk/text_norm")))
    _, teacher, _ = jax.eval_shape(made.init, jax.random.key(0))
    assert "words" not in teacher["embed"] and set(teacher["trunk"]) == {
        "image_blocks", "text_blocks", "image_norm",
    }  # fmt: skip


def test_a_new_teacher_is_the_student():
    params, teacher, _ = jax.jit(objective("apart").init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, ema.held(params, teacher), teacher)


def with_tokenizer():
    tokenizer = image_texts.config("configs/pretrain/beit3.py:smoke", image_texts.MDM).teacher
    return config(contrast__weight=0.0, token_weights__images=1.0, teacher=tokenizer)


def test_codes_of_patches_beside_the_regression():
    """The tokenizer lies in the teacher's tree, where the average leaves it alone."""
    made = bivl.make(with_tokenizer())
    params, teacher, _ = image_texts.created(made)
    assert set(teacher) == {"embed", "trunk", "teacher"}
    assert set(params["heads"]) == {"image_regression", "text_regression", "mim_head", "mlm_head"}
    new, _, _ = made.update(teacher, {}, params, {}, 1)
    assert new["teacher"] is teacher["teacher"] and new["embed"] is not teacher["embed"]
    targets = jax.eval_shape(made.targets, params, teacher, {}, image_texts.batch(), None)
    assert {name: x.shape for name, x in targets["codes"].items()} == {"images": (4, 16)}
    c = with_tokenizer()
    c.teacher.random, c.teacher.checkpoint = False, "somewhere"
    assert bivl.make(c).frozen == {"teacher": "somewhere"}


def test_predictions():
    made, (params, _, _) = objective("joint"), trees("joint")
    pairs = image_texts.batch()["pairs"]
    both = {name: pairs[name] for name in ("image", "tokens")}

    def run(params, both):
        names = ("features", "targets", "attention", "cross_attention", "image_embeddings")
        found = {name: made.predict[name](params, {}, both) for name in names}
        words = {"tokens": both["tokens"]}
        return found | {
            "layers": made.predict["encode"](params, {}, {"image": both["image"]})["layers"],
            "words": made.predict["features"](params, {}, words),
            "pair": made.predict["encode"](params, {}, both)["padding"],
        }

    found = jax.jit(run)(params, both)
    wanted = sum(image_texts.normalized(x[:, 1:], 1) for x in found["layers"][-2:]) / 2
    np.testing.assert_allclose(found["targets"], wanted, atol=2e-5)
    assert found["features"].shape == found["words"].shape == (4, 16)
    assert found["attention"].shape == (4, 2, 4, 4)
    assert found["cross_attention"].shape == (4, 2, 10, 4, 4)
    assert found["image_embeddings"].shape == (4, 8) and found["pair"].shape == (4, 27)
    sums = np.asarray(found["cross_attention"]).sum((-2, -1))
    assert (sums > 0).all() and (sums < 1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target__pairs": "both"}, "config.target.pairs='both' is unknown"),
        ({"target__layer": "middle"}, "config.target.layer='middle' is unknown"),
        (
            {"target__text": {"layer_norms": ("l2",), "norms": ()}},
            "config.target.text.layer_norms='l2'",
        ),
        ({"top_k_layers": 3}, "config.top_k_layers=3 must lie between 1 and model.depth=2"),
        ({"loss__reduction": "max"}, "config.loss.reduction='max' is unknown"),
        ({"ema_decay_end": 1.5}, "config.ema_decay_end=1.5 must lie in"),
        ({"optimizer__accumulate": 2}, "config.optimizer.accumulate=2: contrast compares"),
        ({"contrast__pool": "max"}, "config.contrast.pool='max' is unknown"),
        ({"data__pairs__weight": 0}, "config.contrast.weight needs data.pairs.weight"),
        ({"token_weights__images": 1.0}, "config.teacher.checkpoint is empty"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        bivl.make(config(**changes))
    assert "\n" not in str(caught.value)
