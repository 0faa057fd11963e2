"""The measures of spread and rank against numpy, and when the guard stops a run."""

import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core import collapse
from bivl.core.errors import GuardStop


def test_channel_std_is_that_of_the_masked_tokens():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 4)).astype(np.float32) * [1, 2, 3, 0]
    mask = rng.random((3, 5)) < 0.5
    expected = np.sqrt(x[mask].var(0, ddof=1) + 1e-6).mean()
    assert float(collapse.channel_std(jnp.asarray(x), jnp.asarray(mask))) == pytest.approx(
        expected, rel=1e-5
    )


def test_channel_std_of_like_tokens_is_near_zero():
    x = jnp.full((2, 3, 4), 5.0)
    assert float(collapse.channel_std(x, jnp.ones((2, 3), bool))) == pytest.approx(1e-3)


def test_channel_std_of_one_token_is_finite():
    mask = jnp.zeros((2, 3), bool).at[0, 0].set(True)
    assert np.isfinite(collapse.channel_std(jnp.ones((2, 3, 4)), mask))


def test_channel_std_computes_in_float32():
    x = 100 + jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 8)), jnp.bfloat16)
    found = collapse.channel_std(x, jnp.ones((4, 64), bool))
    assert found.dtype == jnp.float32
    expected = np.asarray(x, np.float64).reshape(-1, 8).std(0, ddof=1).mean()
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_effective_rank_of_one_direction_is_one():
    sizes = np.random.default_rng(0).normal(size=(4, 16, 1))
    x = jnp.asarray(sizes * np.arange(1, 9), jnp.float32)
    assert float(collapse.effective_rank(x)) == pytest.approx(1.0, rel=1e-5)


def test_effective_rank_of_isotropic_tokens_is_about_the_width():
    x = np.random.default_rng(0).normal(size=(8, 512, 8)).astype(np.float32)
    assert 7.5 < float(collapse.effective_rank(jnp.asarray(x), limit=4096)) <= 8
    assert 7 < float(collapse.effective_rank(jnp.asarray(x))) <= 8


def test_effective_rank_is_the_participation_ratio():
    x = np.random.default_rng(1).normal(size=(2, 30, 6)) * [3, 2, 1, 1, 0.1, 0]
    x = (x + 10).astype(np.float32)
    values = np.linalg.eigvalsh(np.cov(x.reshape(-1, 6).T))
    expected = values.sum() ** 2 / (values**2).sum()
    assert float(collapse.effective_rank(jnp.asarray(x))) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_of_like_tokens_is_finite():
    assert float(collapse.effective_rank(jnp.ones((2, 3, 4)))) == 0


def guard(target=0.1, prediction=0.01, after=10, patience=3):
    return collapse.Guard(target, prediction, after, patience)


def values(**changes):
    return {"loss": 1.0, "grad_norm": 1.0, "target_std": 1.0, "prediction_std": 1.0} | changes


def last_step(checked, steps=range(1, 40), **low):
    """The step at which the guard stops a run whose numbers are `low` from the start."""
    for step in steps:
        try:
            checked.check(step, values(**low))
        except GuardStop:
            return step
    return None


def test_a_sound_run_goes_on():
    assert last_step(guard()) is None


@pytest.mark.parametrize("low", [{"target_std": 0.05}, {"prediction_std": 0.005}])
def test_collapse_stops_after_some_updates_in_a_row(low):
    assert last_step(guard(), **low) == 13  # the first 10 are free, then 3 in a row
    assert last_step(guard(after=0, patience=1), **low) == 1
    assert last_step(guard(after=5, patience=0), **low) == 6  # no patience, but after `after`


def test_numbers_at_the_bound_pass():
    assert last_step(guard(), target_std=0.1, prediction_std=0.01) is None


@pytest.mark.parametrize("name", ["target_std", "prediction_std"])
def test_a_bound_of_zero_switches_a_check_off(name):
    off = guard(**{name.removesuffix("_std"): 0.0})
    assert last_step(off, **{name: 0.0}) is None


def test_no_patience_is_no_crash():
    assert last_step(guard(after=0, patience=0)) is None


def test_one_good_update_starts_the_count_again():
    checked = guard(after=0)
    for step, std in enumerate([0.0, 0.0, 1.0, 0.0, 0.0], start=1):
        checked.check(step, values(target_std=std))
    with pytest.raises(GuardStop, match="target_std 0 stayed below 0.1 until step 6"):
        checked.check(6, values(target_std=0.0))


def test_objectives_without_stds_are_not_checked():
    guard(after=0, patience=1).check(1, {"loss": 1.0, "grad_norm": 1.0})


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops_at_once(name, value):
    with pytest.raises(GuardStop, match=f"{name} is {value} at step 1; .*learning_rate"):
        guard().check(1, values(**{name: value}))
