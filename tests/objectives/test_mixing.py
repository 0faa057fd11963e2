import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bivl.objectives import mixing

LABELS = jnp.array([0, 1, 2, 3])


def constant_images(height=16, width=24):
    """Image i is i everywhere, so that a pixel names the example it came from."""
    return jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, height, width, 3))


def mixed(seed, images=None, **settings):
    images = constant_images() if images is None else images
    return mixing.mix(images, LABELS, 6, jax.random.key(seed), **settings)


def test_mixup_blends_images_and_targets_alike():
    amounts = []
    for seed in range(20):
        images, targets = mixed(seed, cutmix_alpha=0.0, smoothing=0.0)
        amount = float(targets[0, 0])
        expected = [i * amount + (3 - i) * (1 - amount) for i in range(4)]
        np.testing.assert_allclose(images[:, 0, 0, 0], expected, atol=1e-5)
        assert np.ptp(np.asarray(images[1])) == 0  # every pixel alike
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(targets[1], [0, amount, 1 - amount, 0, 0, 0], atol=1e-6)
        amounts.append(amount)
    assert len(set(amounts)) == 20


def test_cutmix_pastes_a_box_and_weighs_by_its_true_area():
    areas = []
    for seed in range(30):
        images, targets = mixed(seed, mixup_alpha=0.0, smoothing=0.0)
        pasted = np.asarray(images[0, :, :, 0]) == 3
        assert (np.asarray(images[0])[~pasted] == 0).all()
        np.testing.assert_array_equal(np.asarray(images[2, :, :, 0]) == 1, pasted)
        np.testing.assert_allclose(targets[0, 3], pasted.mean(), atol=1e-6)
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns[None, :])
        assert abs(np.diff(rows.astype(int))).sum() <= 2  # in one piece
        areas.append(pasted.mean())
    assert max(areas) > 0.5 and min(areas) < 0.1


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.75, 1.0])
def test_cutmix_boxes_are_those_of_the_formula(amount):
    side = 15
    length = int(side * np.sqrt(1 - amount))
    found = set()
    for seed in range(80):
        box, area = mixing.cutmix_box(jax.random.key(seed), jnp.float32(amount), (side, side))
        assert float(area) == pytest.approx(np.asarray(box).mean())
        rows = np.flatnonzero(np.asarray(box).any(1))
        found.add((rows[0], rows[-1] + 1) if len(rows) else (0, 0))
    allowed = set()
    for centre in range(side):
        low, high = max(0, centre - length // 2), min(side, centre + (length + 1) // 2)
        allowed.add((low, high) if length else (0, 0))
    assert found <= allowed
    assert len(found) > len(allowed) / 2


def test_probabilities():
    run = jax.jit(jax.vmap(lambda key: _kind(key, 0.9, 0.25)))
    kinds = np.asarray(run(jax.random.split(jax.random.key(0), 3000)))
    assert np.mean(kinds == 0) == pytest.approx(0.1, abs=0.02)
    assert np.mean(kinds == 2) == pytest.approx(0.9 * 0.25, abs=0.03)
    never = [np.asarray(mixed(seed, probability=0.0)[0]) for seed in range(5)]
    off = mixed(0, mixup_alpha=0.0, cutmix_alpha=0.0)[0]
    for images in (*never, off):
        np.testing.assert_array_equal(images, constant_images())


def _kind(key, probability, switch_probability):
    """0 nothing, 1 Mixup, 2 CutMix. Alphas of 1e6 fix lambda at a half: no box is empty."""
    images = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 8, 8, 3))
    found, _ = mixing.mix(
        images, LABELS, 4, key, 1e6, 1e6, probability, switch_probability, smoothing=0.0
    )
    whole = (found == images).all()
    fractions = (found % 1 != 0).any()
    return jnp.where(whole, 0, jnp.where(fractions, 1, 2))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_lambda_has_the_moments_of_beta(alpha):
    def amount(key):
        images = jnp.zeros((4, 1, 1, 3))
        options = {"mixup_alpha": alpha, "cutmix_alpha": 0.0, "smoothing": 0.0}
        return mixing.mix(images, LABELS, 4, key, **options)[1][0, 0]

    found = np.asarray(jax.jit(jax.vmap(amount))(jax.random.split(jax.random.key(3), 4000)))
    assert found.mean() == pytest.approx(0.5, abs=0.02)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_smoothed_targets():
    _, targets = mixed(0, probability=0.0, smoothing=0.1)
    expected = np.full((4, 6), 0.1 / 6)
    expected[range(4), range(4)] = 1 - 0.1 + 0.1 / 6
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    images, targets = mixed(1, cutmix_alpha=0.0, smoothing=0.1)
    amount = 1 - float(images[0, 0, 0, 0]) / 3
    np.testing.assert_allclose(
        targets, expected * amount + expected[::-1] * (1 - amount), atol=1e-5
    )


def test_a_sharded_batch_gives_the_same():
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    images = jax.random.normal(jax.random.key(0), (4 * count, 8, 8, 3))
    labels = jnp.arange(4 * count) % 6
    run = jax.jit(lambda x, y: mixing.mix(x, y, 6, jax.random.key(5), 0.8, 1.0))
    expected = mixing.mix(images, labels, 6, jax.random.key(5), 0.8, 1.0)
    found = run(jax.device_put(images, sharding), jax.device_put(labels, sharding))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_erase_fills_the_boxes_with_normal_noise():
    images = jnp.full((3, 40, 50, 3), 7.0)
    boxes = jnp.array([[0, 0, 0, 0], [5, 10, 30, 40], [39, 49, 1, 1]], jnp.int32)
    found = np.asarray(mixing.erase(images, boxes, jax.random.key(0)))
    assert (found[0] == 7).all()
    inside = np.zeros((40, 50), bool)
    inside[5:35, 10:50] = True
    assert (found[1][~inside] == 7).all()
    noise = found[1][inside]
    assert len(np.unique(noise)) > 0.99 * noise.size  # a value of its own for every channel
    assert abs(noise.mean()) < 0.06 and noise.std() == pytest.approx(1, abs=0.04)
    changed = (found[2] != 7).any(-1)
    assert changed.sum() == 1 and changed[39, 49]
