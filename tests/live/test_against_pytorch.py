"""launch/against_pytorch.py runs every pair of steps that it knows, at sizes of a smoke run."""

import importlib
import json
import math

import pytest

from bivl.core.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.live

ALONE = ["--config.data.images.weight=0", "--config.data.texts.weight=0"]
CONFIGS = {
    "data2vec_image": [],
    "data2vec2_image": ["--config.model.dropout=0.0"],
    "beit3": [*ALONE, "--config.batch_size=8"],
}


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend("launch")
    return importlib.import_module("against_pytorch")


@pytest.mark.parametrize("name", CONFIGS)
def test_both_steps_learn_and_are_timed(script, one_device, monkeypatch, capsys, name):
    losses = {"ours": [], "theirs": []}

    def kept(side):
        make = getattr(script, side)

        def made(*inputs):
            found = make(*inputs)
            step = found[0] if side == "ours" else found

            def noted(n):
                losses[side].append(step(n))

            return (noted, found[1]) if side == "ours" else noted

        monkeypatch.setattr(script, side, made)

    kept("ours"), kept("theirs")
    flags = [f"--config=configs/pretrain/{name}.py:smoke", "--config.optimizer.warmup_steps=0"]
    script.main([*flags, *CONFIGS[name], "--steps=3", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ratio"] > 0 and report["pytorch_seconds"] > 0 and report["steps"] == 3
    for each in losses.values():
        assert len(each) == 5 and all(map(math.isfinite, each))
        assert each[-1] < each[0]
    first = losses["ours"][0], losses["theirs"][0]
    assert first[0] == pytest.approx(first[1], rel=0.3)  # the same loss of other random weights


def test_what_the_references_lack_is_refused(script):
    beit3 = ["--config=configs/pretrain/beit3.py:smoke", *CONFIGS["beit3"]]
    with pytest.raises(UserError, match="add --config.model.drop_path=0.0"):
        script.theirs(script.cli.parse([*beit3, "--config.model.drop_path=0.1"], "", {})[1], {})
    with pytest.raises(UserError, match="choose from data2vec, data2vec2, mdm"):
        script.main(["--config=configs/pretrain/clip.py:smoke"])
