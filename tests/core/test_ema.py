"""The teacher's schedule against recorded numbers, and its arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core import ema
from golden import data2vec_vision as golden

G = golden.load()


@pytest.mark.parametrize(
    ("recorded", "arguments"),
    [
        ("ema_linear", (0.999, 0.9999, 100)),
        ("ema_to_one", (0.9997, 1.0, 100)),
        ("ema_constant", (0.9998, 0.9998, 0)),
    ],
)
def test_rate_matches_the_reference(recorded, arguments):
    rate = ema.update_rate(*arguments)
    found = np.array([rate(n) for n in range(120)])
    np.testing.assert_allclose(1 - found.astype(np.float64), G[f"schedule/{recorded}"], atol=6e-8)
    assert found.dtype == np.float32


def test_rate_reaches_exactly_zero():
    rate = ema.update_rate(0.9997, 1.0, 100)
    assert float(rate(99)) > 0 and float(rate(100)) == 0 and float(rate(jnp.int32(10**9))) == 0


def test_rate_keeps_its_digits():
    """1 - float32(0.99999) is off by 0.1 %."""
    found = float(ema.update_rate(0.99999, 0.99999, 0)(0))
    assert found == pytest.approx(1e-5, rel=1e-6)
    assert abs(float(1 - np.float32(0.99999)) / 1e-5 - 1) > 1e-3


def test_without_annealing_the_end_holds_at_once():
    assert float(ema.update_rate(0.5, 0.9, 0)(0)) == pytest.approx(0.1)


def test_track_is_the_moving_average():
    teacher = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.array([4.0])}}
    params = {"a": jnp.array([3.0, 2.0]), "b": {"c": jnp.array([0.0])}, "head": jnp.zeros(3)}
    found = ema.track(teacher, params, jnp.float32(0.25))
    assert jax.tree.structure(found) == jax.tree.structure(teacher)  # the head has no teacher
    np.testing.assert_allclose(found["a"], [1.5, 2.0])
    np.testing.assert_allclose(found["b"]["c"], [3.0])


def test_what_the_teacher_lacks_is_the_students():
    params = {"embed": {"table": 1, "positions": {"conv": 2}}, "trunk": {"x": 3}, "embedding": 4}
    teacher = ema.without(params, ("embed/positions", "trunk"))
    assert teacher == {"embed": {"table": 1}, "embedding": 4}
    assert ema.without(params, ("embed",)) == {"trunk": {"x": 3}, "embedding": 4}
    moved = {"embed": {"table": 10}, "embedding": 40}
    whole = {"embed": {"table": 10, "positions": {"conv": 2}}, "trunk": {"x": 3}, "embedding": 40}
    assert ema.completed(moved, params) == whole


def test_a_rate_of_zero_freezes_the_teacher():
    teacher = {"x": jnp.array([1.0, 0.3])}
    frozen = ema.track(teacher, {"x": jnp.array([2.0, 7.0])}, jnp.float32(0.0))
    np.testing.assert_array_equal(frozen["x"], teacher["x"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousand_small_steps_add_up(dtype):
    """tau = 0.99999: in bfloat16 the teacher would not move at all."""
    rate = ema.update_rate(0.99999, 0.99999, 0)(0)
    params = {"x": jnp.full((4,), 2.0, dtype)}

    @jax.jit
    def run(teacher):
        return jax.lax.fori_loop(0, 1000, lambda _, t: ema.track(t, params, rate), teacher)

    found = run({"x": jnp.ones(4)})["x"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found - 1, 1 - 0.99999**1000, rtol=5e-3)
