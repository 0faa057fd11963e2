"""How close the tests of data2vec on text and speech hold our numbers to the recorded ones."""

import re

import jax
import numpy as np

import sequences
from bivl.core import ema
from bivl.objectives import distillation

CLOSE = 2.5e-5  # float32 against the recorded float64, README.md beside the files; of activations
MOVED = 1e-5  # and of parameters after steps
STIR = 2e-9  # over a gradient's size: how far its rounding noise moves a weight by Adam's steps


def assert_layers(run: sequences.Run, arrays, name: str) -> None:
    """Input of block 0, every block's output and every FFN's are the recorded ones."""
    for part in ("layers", "ffn"):
        got = np.stack(getattr(run.encoded, part))
        np.testing.assert_allclose(got, arrays[f"{name}/{part}"], atol=CLOSE, err_msg=part)


def assert_seen(run: sequences.Run, arrays, names: dict[str, str]) -> None:
    """Outputs of modules of the embedding are the recorded arrays: {module: name}."""
    for module, name in names.items():
        got = run.seen[f"embed/{module}"][1]
        np.testing.assert_allclose(got, arrays[name], atol=CLOSE, err_msg=name)


def assert_normalized(run: sequences.Run, arrays, name: str, layer_norms) -> None:
    """Every layer's FFN output, normalised by itself, is the recorded one under `targets`.

    From our own activations: the recorded ones are rounded, and the norms enlarge that.
    """
    wanted = arrays[f"{name}targets/normalized"]
    for x, normalized in zip(run.encoded.ffn[-len(wanted) :], wanted, strict=True):
        got = distillation.average_targets([x], layer_norms)
        np.testing.assert_allclose(got, normalized, atol=CLOSE)


def by_layer(tree) -> dict:
    """A tree -> {path: array}, with stacked layers apart."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(key.key for key in path)
        if "blocks" in name:
            flat |= {f"{name}/{i}": np.asarray(part) for i, part in enumerate(leaf)}
        else:
            flat[name] = np.asarray(leaf)
    return flat


def assert_gradients(got, wanted, joint: bool) -> None:
    """Every parameter's within 1e-3 of the recorded one's largest element.

    `joint`: q, k and v have one bias there (2.0), whose numbers are rounded by its largest element.
    """
    got, wanted = by_layer(got), by_layer(wanted)
    assert got.keys() == wanted.keys()
    largest = {name: np.abs(value).max() for name, value in wanted.items()}
    for name, value in wanted.items():
        parts = {re.sub(r"[qkv]_bias", f"{part}_bias", name) for part in "qkv" if joint} | {name}
        atol = max(1e-3 * max(largest[part] for part in parts), 1e-6)  # 1e-6: rounding of zeros
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol, err_msg=name)


def assert_parameters(got, wanted, gradients) -> None:
    """After steps, with the gradients of them; places that were not recorded (NaN) are left out.

    Biases of keys have no gradient but noise, and so do few other weights; Adam, with an eps of
    1e-6, makes steps of it.
    """
    got, wanted, gradients = by_layer(got), by_layer(wanted), [by_layer(g) for g in gradients]
    assert got.keys() == wanted.keys()
    loose = total = 0
    for name, value in wanted.items():
        sizes = np.abs([g[name] for g in gradients])
        smallest = np.where(sizes > 0, sizes, 1.0).min(0)
        atol = MOVED + STIR / np.maximum(smallest, 1e-6)
        there = np.isfinite(value)
        off = np.abs(got[name] - value)
        assert there.any() and (off <= atol)[there].all(), (name, off[there].max())
        loose += 0 if "k_bias" in name else (atol > 10 * MOVED)[there].sum()
        total += there.sum()
    assert loose < 0.005 * total


def assert_steps(name: str, loss: str, history, rtol=2e-5) -> None:
    """Gradients of the first step, numbers of both, both models after them."""
    arrays, (state, _) = sequences.load(name), history[-1]
    gradients = [state.opt_state[0] for state, _ in history]
    assert_gradients(gradients[0], sequences.tree(name, "grad"), joint="2_" in name)
    for key in sequences.METRICS:
        values = arrays[f"step/{key}" if f"step/{key}" in arrays else f"step/{loss}/{key}"]
        got = [metrics[key] for _, metrics in history]
        np.testing.assert_allclose(got, values, rtol=rtol, err_msg=key)
    assert_parameters(state.params, sequences.tree(name, "step2/param"), gradients)
    whole = ema.completed(state.teacher, state.params)
    wanted = sequences.tree(name, "step2/teacher_param", "step2/param")
    assert_parameters(whole, wanted, gradients)


def assert_normal(tree) -> None:
    """Kernels N(0, 0.02^2) not cut at one or two deviations, biases 0, scales 1."""
    for name, value in by_layer(tree).items():
        if "kernel" in name:
            np.testing.assert_allclose(value.std(), 0.02, rtol=0.1, err_msg=name)
            assert np.abs(value).max() > 0.05, name
        else:
            np.testing.assert_array_equal(value, 1.0 if "scale" in name else 0.0, err_msg=name)


def assert_uniform(part: dict, fan: int) -> None:
    """Kernel and bias U(-1, 1) / sqrt(fan in), PyTorch's default."""
    for name in ("kernel", "bias"):
        x = part[name] * fan**0.5
        few = 3 * x.size**-0.5  # more than three standard errors
        assert 1 - 8 / x.size < np.abs(x).max() <= 1, name
        assert abs(x.mean()) < few and abs(x.std() - 3**-0.5) < few, name
