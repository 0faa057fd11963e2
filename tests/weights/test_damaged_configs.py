"""A config.json that is another model's, or damaged, ends in one line that says so."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import weight_writers
from test_align_weights import CONFIG as ALIGN
from test_clip import to_huggingface

import conversions
from bivl import convert
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.weights.incoming import Official
from golden import data2vec_vision

RECORDED = data2vec_vision.FILE.with_name("data2vec_huggingface.npz")
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-5}


def recorded(kind):
    with np.load(RECORDED) as file:
        start = f"{kind}/params/"
        params = {k.removeprefix(start): file[k] for k in file.files if k.startswith(start)}
        return params, json.loads(str(file[f"{kind}/config"]))


def model(kind):
    """(tensors, config.json) of a model of transformers'."""
    if kind in ("image", "text", "audio"):
        return recorded(kind)
    if kind == "beit":
        params, config = recorded("image")
        renamed = {k.replace("data2vec_vision.", "beit."): v for k, v in params.items()}
        return renamed, config | {"model_type": "beit"}
    if kind == "clip":
        tower = LAYERS | {"hidden_act": "quick_gelu", "eos_token_id": 39}
        towers = {"vision_config": tower | {"num_attention_heads": 3}}
        towers |= {"text_config": tower | {"num_hidden_layers": 3}, "model_type": "clip"}
        return to_huggingface(conversions.golden("clip")[0]), towers
    if kind == "vilt":
        settings = {"num_attention_heads": 3, "hidden_dropout_prob": 0.0, "pad_token_id": 0}
        settings |= {"model_type": "vilt", "hidden_act": "gelu", "max_image_length": -1}
        return conversions.golden("vilt")[0], LAYERS | settings
    return conversions.golden("align")[0], ALIGN


KINDS = ("image", "text", "audio", "beit", "clip", "vilt", "align")


def planned(folder, params, config):
    """The config that a folder becomes, no further."""
    folder.mkdir(exist_ok=True)
    weight_writers.safetensors(folder / "model.safetensors", params)
    (folder / "config.json").write_text(json.dumps(config))
    found = Official(folder, None, None, convert.families(), False)
    return convert.configured(found.plan)


def refused(folder, params, config, said):
    with pytest.raises(UserError, match=said) as caught:
        planned(folder, params, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_layers_as_the_config_says(kind, tmp_path):
    """Else the last ones are in a file that is not there, say."""
    params, config = model(kind)
    planned(tmp_path, params, config)
    towers = [key for key in ("vision_config", "text_config") if key in config] or [""]
    for key in towers:
        if (kind, key) != ("align", "vision_config"):  # whose blocks are counted otherwise
            own = (config[key] if key else config) | {"num_hidden_layers": 7}
            said = r"the file has [23] layers \(\S+, ...\), its config 7; get all files"
            refused(tmp_path, params, config | ({key: own} if key else own), said)
    if kind != "align":
        last = re.compile(r".*\b(layer|layers)\.1\.(?!conv|layer_norm)")
        left = {k: v for k, v in params.items() if not last.match(k)}
        assert len(left) < len(params)
        refused(tmp_path, left, config, "the file has [12] layers .* its config 2")


JUNK = "x", None, True, 1.5, 10**400, math.inf, [], [[1], [2]], {"a": 1}
READ = ("hidden_act", "image_size", "layer_norm_eps", "layer_scale_init_value", "conv_stride")
READ += ("num_hidden_layers", "num_attention_heads", "pad_token_id", "eos_token_id", "model_type")
READ += ("max_image_length", "hidden_dropout_prob", "batch_norm_eps", "strides", "depth_divisor")


@pytest.mark.parametrize("kind", KINDS)
def test_junk(kind, tmp_path):
    """Whatever stands there, the config is refused, or has the numbers that a recipe has."""
    params, config = model(kind)
    usual = configs.flatten(planned(tmp_path, params, config))
    towers = [key for key in ("vision_config", "text_config") if key in config] or [""]
    for tower, key, value in itertools.product(towers, READ, JUNK):
        own = config[tower] if tower else config
        if key not in own:
            continue
        own = own | {key: value}
        try:
            found = planned(tmp_path, params, config | ({tower: own} if tower else own))
            configs.check_numbers(found)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        for name, new in configs.flatten(found).items():
            old = usual[name]
            number = type(old) in (int, float) and type(new) in (int, float)
            assert type(new) is type(old) or number or None in (old, new), (key, value, name)


@pytest.mark.parametrize(
    ("kind", "key", "value", "said"),
    [
        (
            "image",
            "layer_norm_eps",
            "1e-5",
            "makes config.model.eps '1e-5', .* --config.model.eps=",
        ),
        ("text", "layer_norm_eps", None, "makes config.model.eps None"),
        ("audio", "conv_stride", [0, 0, 0], "model.extractor.strides is not known"),
        ("audio", "conv_stride", 5, "model.extractor.strides is not known"),
        ("vilt", "hidden_act", ["gelu"], r"hidden_act=\['gelu'\], which is not supported"),
        ("vilt", "pad_token_id", 10**400, "makes config.model.pad 1000000"),
        ("vilt", "hidden_dropout_prob", "x", "makes config.model.dropout 'x'"),
    ],
)
def test_junk_is_named(kind, key, value, said, tmp_path):
    params, config = model(kind)
    refused(tmp_path, params, config | {key: value}, said)


def test_the_command_line_goes_before_junk(tmp_path):
    params, config = model("image")
    config["layer_norm_eps"] = "1e-5"
    with pytest.raises(UserError):
        planned(tmp_path, params, config)
    flags = [f"--source={tmp_path}", f"--out={tmp_path}/ours", "--config.model.eps=1e-5"]
    convert.main(flags)
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model"]["eps"] == 1e-5


@pytest.mark.parametrize("kind", ["image", "beit"])
@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("layer_scale_init_value", "lambda_"),
        ("use_relative_position_bias", "relative_position_bias"),
        ("use_shared_relative_position_bias", "relative_position_bias"),
    ],
)
def test_what_the_config_says_is_there(kind, key, part, tmp_path):
    """A model without scales or positions is a model too, but another one."""
    params, config = model(kind)
    params = {k: v for k, v in params.items() if part not in k}
    config["use_relative_position_bias"] = False
    value = 0.1 if "scale" in key else True
    refused(tmp_path, params, config | {key: value}, f"has {key}={value}, but the file no .*{part}")
    changed = planned(tmp_path, params, config | {key: False})
    assert changed.model.layer_scale == (0.0 if part == "lambda_" else 1e-1)
