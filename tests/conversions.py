"""What the tests of conversions share: recorded numbers, theirs to ours, and back again."""

import functools
import json
from pathlib import Path

import numpy as np

import bivl
from bivl import convert
from bivl.weights import files


@functools.cache
def golden(name: str):
    """(parameters by their names, the other arrays) of tests/golden/NAME.npz."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
    return params, arrays


def read_report(family: str, out):
    """conversion.json of a checkpoint, by which nothing is left open."""
    report = json.loads((out / "conversion.json").read_text())
    assert report["family"] == family and not report["missing"] and not report["unused"]
    return report


def converted(family: str, folder, *flags):
    """The model that folder/theirs becomes."""
    convert.main([f"--source={folder}/theirs", f"--out={folder}/ours", *flags])
    read_report(family, folder / "ours")
    return bivl.load(folder / "ours")


def close(ours, theirs, at=np.s_[:]):
    """Arrays of ours and PyTorch's within 1e-4, `at` those places."""
    assert ours.shape == tuple(theirs.shape)
    np.testing.assert_allclose(np.asarray(ours)[at], theirs.numpy()[at], rtol=0, atol=1e-4)


def give_back(folder):
    """folder/ours -> folder/back for transformers: the tensors of folder/theirs, as they were."""
    convert.main([f"--source={folder}/ours", f"--out={folder}/back", "--to=huggingface"])
    one, two = (
        files.open_weights(folder / part / "model.safetensors").tensors
        for part in ("theirs", "back")
    )
    assert set(one) == set(two)
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (two[key].dtype, two[key].shape)
        np.testing.assert_array_equal(tensor.read(), two[key].read(), err_msg=key)


def reloaded(model, folder, **options):
    """A model of this class by from_pretrained, which misses and ignores nothing."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()
