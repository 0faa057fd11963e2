"""Models that were trained here leave under the names of others, and are known there: by shapes."""

import functools
import json

import numpy as np
import pytest

from bivl import convert, model
from bivl.core import config as configs
from bivl.core.piecemeal import Deferred
from bivl.weights import export as exports
from bivl.weights import matching
from bivl.weights.export import Origin
from bivl.weights.files import Weights
from bivl.weights.incoming import recognised, shapes

CASES = {
    "pretrain/data2vec_image.py:smoke": "data2vec-vision",
    "pretrain/data2vec_text.py:smoke": "data2vec-text",
    "pretrain/data2vec_speech.py:smoke": "data2vec-audio",
    "pretrain/data2vec2_image.py:smoke": "data2vec2",
    "pretrain/data2vec2_text.py:smoke": "data2vec-text",
    "pretrain/data2vec2_speech.py:smoke": "data2vec2",
    "finetune/data2vec_image.py:smoke": "data2vec-vision",
    "finetune/data2vec2_image.py:smoke": "data2vec2",
    "finetune/glue.py:smoke": "data2vec-text",
    "finetune/ctc.py:smoke": "data2vec-audio",
    "finetune/ctc.py:version=2,smoke": "data2vec2",
}
KEYS = ("width", "depth", "num_heads", "mlp_dim", "eps", "norm", "positions", "patch_size", "alibi")


@pytest.mark.parametrize("spec", CASES)
def test_there_and_back(spec):
    kind = CASES[spec]
    config = configs.load(f"{convert.CONFIGS}/{spec}")
    ours, _ = shapes(model.make_objective(config))
    to = "official" if kind == "data2vec2" else "huggingface"
    made = (function(config, ours, Origin()) for function in convert.exporters(to))
    made = next(filter(None, made))
    assert made.config["model_type"] == kind
    zeros = functools.partial(np.broadcast_to, np.float32(0))
    arrays = {
        path: Deferred(shape, np.dtype("f"), functools.partial(zeros, shape))
        for path, shape in ours.items()
    }
    tensors = dict(exports.folder(made, arrays, Origin(), {}, {}).tensors)
    settings = json.loads(json.dumps(made.config))
    weights = Weights(tensors, settings, ("config.json",), "huggingface")
    family, _, layout = recognised(weights, None, convert.families())
    assert family == kind.split("-")[0]
    plan = layout.plan(weights, None)
    again = convert.configured(plan)
    theirs, _ = shapes(model.make_objective(again))
    found = matching.match(
        plan.table, {k: t.shape for k, t in tensors.items()}, theirs, tuple(plan.fresh)
    )
    assert not found.missing and not found.unused
    filled = {piece.path for piece in found.pieces}
    kept = {k for k in ours if not k.startswith(tuple(f"{start}/" for start in made.left_out))}
    assert filled == kept and all(theirs[path] == ours[path] for path in filled)
    for key in set(KEYS) & set(config.model):
        assert again.model[key] == config.model[key], key
