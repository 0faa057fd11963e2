import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bivl.core.errors import GuardStop, UserError
from bivl.evaluators import features, fewshot, knn, linear


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17])
def test_padding_is_dropped_and_order_kept(identity, splits_of, blobs, count):
    data = blobs(count, 3, 2)
    splits = splits_of(data, data, batch_size=8)
    found = features.extract(identity, splits, "train", jnp.float32(2.0), None)
    np.testing.assert_allclose(found.features, 2 * data["x"])
    assert found.features.dtype == np.float32
    np.testing.assert_array_equal(found.labels, data["label"])
    np.testing.assert_array_equal(found.ids, np.arange(count))


def test_low_precision_features_arrive_as_float32(splits_of, blobs):
    predict = {"features": lambda params, extras, batch: batch["x"].astype(jnp.bfloat16)}
    data = blobs(5, 3, 2)
    found = features.extract(predict, splits_of(data, data), "test", {}, {})
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, data["x"], rtol=1e-2)


def test_features_sharded_over_a_mesh(splits_of, blobs):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    run = jax.jit(lambda params, extras, batch: batch["x"] + 1, out_shardings=sharding)
    data = blobs(9, 3, 2)
    found = features.extract({"features": run}, splits_of(data, data), "train", {}, {})
    np.testing.assert_allclose(found.features, data["x"] + 1)


def test_probes_share_one_pass_and_new_parameters_start_another(identity, splits_of, blobs):
    calls = []
    splits = splits_of(blobs(40, 4, 2), blobs(20, 4, 2, seed=1), calls=calls)
    runs = [
        knn.make(identity, splits, {}),
        linear.make(identity, splits, {"l2": (0.1,)}),
        fewshot.make(identity, splits, {"shots": (5,)}),
    ]
    old = {"scale": jnp.ones(4)}
    predict_scale = identity["features"]
    identity["features"] = lambda params, extras, batch: predict_scale(
        params["scale"], extras, batch
    )
    for run in runs:
        run(old, None)
    assert calls == ["train", "test"]
    new = {"scale": jnp.ones(4).at[0].set(3.0)}
    found = features.extract(identity, splits, "test", new, None)
    assert calls == ["train", "test", "test"]
    np.testing.assert_allclose(found.features[:, 0], 3 * blobs(20, 4, 2, seed=1)["x"][:, 0])


def test_memory_does_not_keep_parameters_alive(identity, splits_of, blobs):
    splits = splits_of(blobs(4, 3, 2), blobs(4, 3, 2))
    params = jnp.ones(3) * 2
    features.extract(identity, splits, "train", params, None)
    _, weak = splits.memory["train", "features"][0]
    assert weak() is params
    del params
    gc.collect()
    assert weak() is None


def test_batches_without_labels_still_give_features(identity, splits_of):
    data = {"x": np.ones((3, 2), np.float32)}
    found = features.extract(identity, splits_of(data, data), "test", jnp.float32(1), None)
    assert found.labels is None
    assert found.features.shape == (3, 2)


PROBES = pytest.mark.parametrize("probe", [knn, linear, fewshot])


@PROBES
def test_missing_labels_are_refused(identity, splits_of, blobs, probe):
    data = blobs(20, 3, 2)
    unlabelled = {"x": data["x"]}
    with pytest.raises(UserError, match="eval_data.train has no labels; .*fields.label"):
        probe.make(identity, splits_of(unlabelled, data), {})(jnp.float32(1), None)
    with pytest.raises(UserError, match="eval_data.test has no labels; .*fields.label"):
        probe.make(identity, splits_of(data, unlabelled), {})(jnp.float32(1), None)


@PROBES
def test_test_classes_unknown_to_train_are_refused(identity, splits_of, blobs, probe):
    splits = splits_of(blobs(20, 3, 2), blobs(20, 3, 3), classes=("cat", "dog", "owl"))
    with pytest.raises(UserError, match=r"1 of its classes nowhere .*first: owl\); "):
        probe.make(identity, splits, {})(jnp.float32(1), None)


@PROBES
def test_unknown_setting_is_refused_by_name(identity, splits_of, blobs, probe):
    data = blobs(20, 3, 2)
    with pytest.raises(UserError, match="has no key 'kk'; it takes "):
        probe.make(identity, splits_of(data, data), {"kk": 3})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 9]), "label 9 but only 2 classes"),
        (np.array([0, 1, -1]), "label -1, which marks unlabelled"),
        (np.array([0.0, 1.0, 1.0]), "are float64"),
        (np.array([[0, 1], [1, 0]]), r"shape \(2, 2\)"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        features.check_labels(labels, "train", ("a", "b"))


def test_sparse_class_numbers_are_renumbered(identity, splits_of, blobs):
    train, test = blobs(20, 3, 2), blobs(10, 3, 2)
    for part in (train, test):
        part["label"] = np.array([7, 1_000_000])[part["label"]]
    splits = splits_of(train, test)
    found, _, num_classes = features.labelled(identity, splits, jnp.float32(1), None)
    assert num_classes == 2
    np.testing.assert_array_equal(found.labels, np.arange(20) % 2)


def test_empty_split_and_diverged_model(identity, splits_of, blobs):
    data = blobs(4, 3, 2)
    empty = features.Splits(lambda split: iter(()), None)
    with pytest.raises(UserError, match="eval_data.test has no examples; "):
        features.extract(identity, empty, "test", jnp.float32(1), None)
    with pytest.raises(GuardStop, match="not finite"):
        features.extract(identity, splits_of(data, data), "test", jnp.float32(np.nan), None)


@pytest.mark.parametrize("value", [(), 0, (5, -1), "many", 1.5])
def test_numbers_refuses_what_is_not_positive(value):
    with pytest.raises(UserError, match="config.eval.knn.k is .*; give "):
        features.numbers(value, "config.eval.knn.k")
    assert features.numbers(3, "config.eval.knn.k") == (3,)
