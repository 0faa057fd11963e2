"""Loading, overriding, checking, saving configs, and what a resume may change."""

import json
import math
import textwrap

import pytest
from ml_collections import ConfigDict

from bivl.core import config as configs
from bivl.core.errors import UserError
from configs import common

RECIPE = """
from configs import common

def get_config(text=None):
    chosen = common.options(text, {"size": "base", "quick": False})
    c = common.base()
    c.objective, c.modality, c.model = "data2vec", "image", {"width": 32}
    c.batch_size, c.steps = 8, 2 if chosen["quick"] else 100
    c.name = chosen["size"]
    return c
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(textwrap.dedent(RECIPE))
    return str(file)


@pytest.mark.parametrize(
    ("options", "name", "steps"),
    [("", "base", 100), (":size=small", "small", 100), (":quick,size=tiny", "tiny", 2)],
)
def test_options(options, name, steps, recipe):
    config = configs.load(recipe + options)
    assert (config.name, config.steps) == (name, steps)
    assert config.is_locked


def test_unknown_option_names_those_there_are(recipe):
    with pytest.raises(UserError, match=r"'huge' is unknown; this config has \['quick', 'size'\]"):
        configs.load(f"{recipe}:huge")


def small():
    return configs.from_dict(
        {
            "steps": 10,
            "rate": 0.5,
            "name": "a",
            "flag": False,
            "pair": (1, 2),
            "names": ("x",),
            "none": None,
            "empty": (),
            "mesh": {"data": -1},
            "group": {"inner": {"leaf": 3}},
        }
    )


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "20", 20),
        ("steps", "2e3", 2000),
        ("steps", " 7 ", 7),
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("name", "12", "12"),
        ("name", "", ""),
        ("name", "a=b", "a=b"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "1", True),
        ("pair", "(3, 4, 5)", (3, 4, 5)),
        ("pair", "3,4", (3, 4)),
        ("pair", "[0.5]", (0.5,)),
        ("pair", "7", (7,)),
        ("pair", "", ()),
        ("names", "knn, linear", ("knn", "linear")),
        ("names", "('knn',)", ("knn",)),
        ("names", "", ()),
        ("empty", "knn", ("knn",)),
        ("none", "0.5", 0.5),
        ("none", "None", None),
        ("none", "text", "text"),
        ("mesh.data", "-1", -1),
        ("group.inner.leaf", "4", 4),
    ],
)
def test_override(key, text, value):
    config = small()
    configs.override(config, [(key, text)])
    found = configs.flatten(config)[key]
    assert found == value and type(found) is type(value)
    assert config.is_locked


def test_later_overrides_win():
    config = small()
    configs.override(config, [("steps", "3"), ("steps", "4")])
    assert config.steps == 4


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("stpes", "1", "config has no key 'stpes'; did you mean config.steps?"),
        ("group.inner.laef", "1", "config.group.inner has no key 'laef'; did you mean"),
        ("qqq", "1", r"config has no key 'qqq'; it has \["),
        ("", "1", "config has no key ''"),
        ("group..leaf", "1", "config.group has no key ''"),
        ("group", "1", r"config.group is a group of keys; set one of \['inner'\]"),
        ("steps.x", "1", "config.steps is one value"),
        ("steps", "ten", "config.steps='ten' is not a number; its value now is 10"),
        ("steps", "", "config.steps='' is not a number"),
        ("steps", "1.5", "not a whole number"),
        ("steps", "True", "not a number"),
        ("steps", "None", "not a number"),
        ("steps", "(1,)", "not a number"),
        ("steps", "nan", "config.steps=nan must be a finite number"),
        ("steps", "1e400", "config.steps=inf must be a finite number"),
        ("steps", "9" * 400, "not a number"),
        ("steps", "9" * 5000, "config.steps="),
        ("steps", "{[]: 1}", "not a number"),
        ("steps", "-1", "config.steps=-1 must be a finite number >= 0"),
        ("steps", "2147483648", "too large"),
        ("rate", "nan", "config.rate=nan"),
        ("rate", "-1e-3", "config.rate=-0.001"),
        ("rate", "fast", "not a number"),
        ("flag", "yes", "config.flag='yes' is not true or false"),
        ("pair", "a,b", "not a tuple of the same kind"),
        ("pair", "(1, 'b')", "not a tuple of the same kind"),
        ("pair", "(1, -2)", "config.pair=-2"),
        ("names", "1,2", "not a tuple of the same kind"),
        ("none", "-5", "config.none=-5"),
        ("mesh.data", "-2", "config.mesh.data=-2 must be a finite number >= -1"),
    ],
)
def test_override_refuses(key, text, words):
    with pytest.raises(UserError, match=words):
        configs.override(small(), [(key, text)])


def test_choice():
    configs.choice("model.norm", "pre", ("pre", "post"))
    with pytest.raises(UserError, match=r"^config.model.norm='x' is unknown; use one of \['a'"):
        configs.choice("model.norm", "x", ("b", "a"))


def test_json_round_trip(recipe):
    config = configs.load(recipe)
    back = configs.from_dict(json.loads(configs.to_json(config)))
    assert back == config and back.is_locked
    assert configs.flatten(back) == configs.flatten(config)
    assert back.optimizer.phases == (0.05, 0.8, 0.15)  # a tuple again


def test_flatten():
    assert configs.flatten(ConfigDict({"a": {"b": 1, "c": {"d": None}}, "e": ()})) == {
        "a.b": 1,
        "a.c.d": None,
        "e": (),
    }


ALLOWED = [
    ("steps", "7"),
    ("log_every", "7"),
    ("evaluate_every", "7"),
    ("evaluators", "knn"),
    ("eval.knn.k", "3"),
    ("eval_data.test.split", "validation"),
    ("mesh.fsdp", "2"),
    ("loader.workers", "3"),
    ("checkpoint.keep", "5"),
    ("guard.patience", "3"),
    ("data.dir", "/elsewhere"),
    ("optimizer.accumulate", "2"),
]
REFUSED = [
    ("seed", "1"),
    ("batch_size", "3"),
    ("dtype", "bfloat16"),
    ("objective", "other"),
    ("data.kind", "digits"),
    ("data.split", "train[:50%]"),
    ("data.fields.image", "picture"),
    ("optimizer.learning_rate", "1"),
    ("optimizer.warmup_steps", "1"),
    ("init", "/elsewhere"),
]


@pytest.mark.parametrize(("key", "text"), ALLOWED)
def test_a_resume_may_change(key, text):
    config = common.base()
    configs.override(config, [(key, text)])
    assert configs.flatten(config) != configs.flatten(common.base())
    configs.check_resume(common.base(), config, "DIR")


def test_a_resume_may_decode_at_another_scale():
    saved, later, scaled = (
        ConfigDict({"augment": {"flip": True} | more})
        for more in ({}, {"scaled_decoding": False}, {"scaled_decoding": True})
    )
    configs.check_resume(saved, later, "DIR")  # of before there was the key
    configs.check_resume(later, scaled, "DIR")
    with pytest.raises(UserError, match="config.augment.flip is False"):
        configs.check_resume(saved, ConfigDict({"augment": {"flip": False}}), "DIR")


@pytest.mark.parametrize(("key", "text"), REFUSED)
def test_a_resume_may_not_change(key, text):
    config = common.base()
    configs.override(config, [(key, text)])
    with pytest.raises(UserError, match=f"config.{key} is .* but the run in DIR has"):
        configs.check_resume(common.base(), config, "DIR")


def test_a_resume_may_neither_add_nor_drop_a_key():
    more = configs.from_dict({"steps": 1, "extra": 3})
    less = configs.from_dict({"steps": 1})
    for saved, config in ((more, less), (less, more)):
        with pytest.raises(UserError, match="config.extra"):
            configs.check_resume(saved, config, "DIR")


def test_infinite_numbers_are_refused_anywhere():
    with pytest.raises(UserError, match="config.a.b=inf"):
        configs.check_numbers(ConfigDict({"a": {"b": (1.0, math.inf)}}))
