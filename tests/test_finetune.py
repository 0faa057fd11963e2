"""Fine-tuning end to end at tiny sizes: what comes from the checkpoint, what is new, resuming."""

import dataclasses
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from bivl import evaluate, train
from bivl.core import checkpoint
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.data import sources
from configs.finetune import glue

pytestmark = pytest.mark.usefixtures("quick_compile", "one_device")


MODEL = {"model.width": "32", "model.depth": "1", "model.num_heads": "2", "model.mlp_dim": "64"}
IMAGE = {"image_size": "32", "data.image_size": "32"}
BEIT3 = {"batch_size": "24"}  # of all parts
SPEECH = {
    "model.extractor.width": "16",
    "model.extractor.kernels": "20,8",  # 320 samples a frame too, but two layers to compile
    "model.extractor.strides": "20,16",
    "model.position_conv.depth": "1",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A pair of configs that fit, and what fine-tuning makes new and leaves unused."""

    pretrain: str
    finetune: str
    new: str  # the first of the new parameters
    unused: tuple[str, ...]
    metric: str
    both: dict  # changes that make both small, of pre-training alone, of fine-tuning alone
    first: dict
    tuned: dict


CASES = {
    "data2vec_image": Case(
        "data2vec_image.py:smoke",
        "data2vec_image.py:smoke",
        "head/logits",
        ("params/head/projection/bias", "params/trunk/norm/scale"),
        "accuracy/top1",
        IMAGE,
        {},
        {},
    ),
    "data2vec2_image": Case(
        "data2vec2_image.py:smoke",
        "data2vec2_image.py:smoke",
        "head/logits",
        ("params/decoder/",),
        "accuracy/top1",
        IMAGE,
        {"masking.num_masks": "2", "decoder.depth": "1", "decoder.width": "16"},
        {},
    ),
    "beit3_image": Case(
        "beit3.py:smoke",
        "beit3_image.py:smoke",
        "head/logits",
        ("params/heads/mlm_head/bias", "params/trunk/image_norm/scale", "params/embed/words/table"),
        "accuracy/top1",
        {},
        BEIT3,
        {},
    ),
    "vqa": Case(
        "beit3.py:smoke",
        "vqa.py:smoke",
        "head/pooler",
        ("params/heads/mlm_head/bias", "params/trunk/image_norm/scale"),
        "accuracy/top5",
        {},
        BEIT3,
        {},
    ),
    "nlvr2": Case(
        "beit3.py:smoke",
        "nlvr2.py:smoke",
        "head/dense",
        ("params/heads/mlm_head/bias",),
        "accuracy/top1",
        {},
        BEIT3,
        {},
    ),
    "glue": Case(
        "data2vec_text.py:smoke",
        "glue.py:smoke",
        "head/dense",
        ("params/head/fc/kernel", "params/head/projection/bias"),
        "accuracy/top1",
        {"text.length": "32"},
        {},
        {"text.input_length": "16"},
    ),
    "ctc": Case(
        "data2vec_speech.py:smoke",
        "ctc.py:smoke",
        "letters",
        ("params/head/projection/kernel",),
        "wer",
        SPEECH,
        {"audio.length": "8000"},
        {"optimizer.freeze_steps": "1", "data.num_examples": "16"},
    ),
}


def load(spec, **changes):
    """A config under configs/ with dotted changes, `__` for the dots."""
    config = configs.load(f"configs/{spec}")
    small = MODEL | {"batch_size": "8", "eval.batch_size": "8"}
    changes = {name.replace("__", "."): str(value) for name, value in changes.items()}
    configs.override(config, list((small | changes).items()))
    return config


def pretrained(name, folder):
    """Pre-training from another seed, two updates of texts (the others: their initial values);
    returns the workdir and the parameters."""
    case, workdir = CASES[name], folder / "pretrained"
    steps = 2 if name == "glue" else 0
    changes = {"steps": steps, "seed": 5, "evaluators": ""}
    changes |= {} if case.pretrain == "beit3.py:smoke" else {"top_k_layers": 1}
    config = load(f"pretrain/{case.pretrain}", **case.both, **case.first, **changes)
    return workdir, train.train(config, workdir).params


def tuned(name, init, **changes):
    """The config of fine-tuning from a workdir."""
    case = CASES[name]
    return load(f"finetune/{case.finetune}", **case.both, **case.tuned, init=init, **changes)


def flat(tree):
    """Tree -> {path: numpy array}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves
    }


def differing(first, second):
    """The paths of two flat trees whose arrays differ."""
    return {path for path in first if (first[path] != second[path]).any()}


def check_frozen(config, workdir, state, before, encoder):
    """After update 1 the encoder stands where it stood; from there a resume gives the same bits."""
    shutil.rmtree(workdir / "checkpoints" / "2")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    first = checkpoint.restore_part(checkpoint.find(workdir, 1), {"params": shapes})
    assert differing(before, flat(first["params"])) == before.keys() - encoder
    runs.assert_same(train.train(config, workdir), state)


@pytest.mark.parametrize("name", CASES)
def test_from_pretraining_to_a_score(name, tmp_path, caplog):
    case = CASES[name]
    init, source = pretrained(name, tmp_path)
    source, workdir = flat(source), tmp_path / "tuned"
    with caplog.at_level(logging.INFO, "bivl"):
        before = flat(train.train(tuned(name, init, steps=0), workdir).params)
    # The encoder is that of the checkpoint bit for bit, all else has the values of its init.
    encoder = {path for path in before if path.startswith(("embed/", "trunk/"))}
    for path in encoder:
        np.testing.assert_array_equal(before[path], source[path], err_msg=path)
    new = before.keys() - encoder
    assert new and all(path.startswith(("head/", "letters/")) for path in new)
    assert any(path.startswith(case.new) for path in new)
    for path in new:
        assert f"init: {path} keeps its own values (not in the checkpoint)" in caplog.text
    assert f"init: {len(encoder)} of {len(before)} arrays loaded from {init}" in caplog.text
    unused = caplog.text.partition("init: not used from the checkpoint: ")[2].partition("\n")[0]
    assert all(path in unused for path in case.unused)
    assert {path.removeprefix("params/") for path in unused.split(", ")} == source.keys() - encoder
    if name == "data2vec2_image":  # all that follows is as for data2vec_image
        return
    # The same command goes on, and does not start from the pre-training again.
    caplog.clear()
    config = tuned(name, init, steps=2, checkpoint__every=1, checkpoint__keep=3)
    with caplog.at_level(logging.INFO, "bivl"):
        state = train.train(config, workdir)
    assert "resumed at step 0" in caplog.text and "init:" not in caplog.text
    moved = differing(before, flat(state.params))
    assert moved & new and moved & encoder
    if name == "ctc":
        check_frozen(config, workdir, state, before, encoder)
    scores = runs.lines(workdir, "evaluations")
    assert [line["step"] for line in scores] == [0, 2]
    assert all(np.isfinite(line[case.metric]) for line in scores)


def write_tsv(folder, name, header, rows):
    lines = ["\t".join(row) for row in (header, *rows)]
    (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


ROWS = {  # what the files of GLUE look like: header, one line, class names or a number
    "mnli": (
        "index promptID pairID genre sentence1 sentence2 label1 gold_label",
        ("0", "1", "1n", "fiction", "A cat.", "A dog.", "neutral", "neutral"),
        ("entailment", "contradiction"),
    ),
    "qnli": ("index question sentence label", ("0", "A cat.", "A dog.", "entailment"), ("no",)),
    "qqp": (
        "id qid1 qid2 question1 question2 is_duplicate",
        ("0", "1", "2", "A cat.", "A dog.", "1"),
        ("0",),
    ),
    "sst2": ("sentence label", ("A cat.", "1"), ("0",)),
    "cola": ("source label star sentence", ("gj04", "1", "", "A cat."), ()),
    "mrpc": (
        "Quality,#1 ID,#2 ID,#1 String,#2 String",
        ("1", "702", "703", "A cat.", "A dog."),
        (),
    ),
    "rte": ("index sentence1 sentence2 label", ("0", "A cat.", "A dog.", "entailment"), ("no",)),
    "stsb": ("index genre sentence1 sentence2 score", ("0", "x", "A cat.", "A dog.", "3.5"), ()),
}


@pytest.mark.parametrize("task", glue.TASKS)
def test_fields_of_the_tasks(task, tmp_path):
    header, row, others = ROWS[task]
    header = header.split("," if "," in header else None)
    rows = [row, *((*row[:-1], other) for other in others)]
    dev = "dev_matched" if task == "mnli" else "dev"
    for split in ("train", dev):
        write_tsv(tmp_path, split, header, rows)
    config = configs.load(f"configs/finetune/glue.py:task={task}")
    config.data.dir = str(tmp_path)
    assert config.eval.glue.task == task and config.evaluators == ("glue",)
    for split in ("train", "test"):
        source = sources.open_source(evaluate.data_of(config, split))
        record = source[0]
        assert record["text"] == "A cat."
        assert record.get("text_pair") == (None if task in ("sst2", "cola") else "A dog.")
        classes = len(source.classes or ()) or config.num_classes
        assert classes == config.num_classes
        assert record["label"] == {"mnli": 2, "qnli": 0, "rte": 0, "stsb": 3.5}.get(task, 1)


def one_line(error):
    assert "\n" not in str(error.value)


def test_data_without_texts(tmp_path):
    config = tuned("glue", "", data__kind="digits", num_classes=10, data__split="train")
    with pytest.raises(UserError, match=r"set config\.data\.fields\.text") as error:
        train.train(config, tmp_path / "run")
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_more_classes_than_the_model_has(tmp_path):
    with pytest.raises(UserError, match="config.num_classes=4 but the data has 9 classes") as error:
        train.train(tuned("glue", "", num_classes=4), tmp_path / "run")
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_a_label_that_is_no_class(tmp_path):
    """One bad line in the middle of a file."""
    rows = [("a dog", str(i % 2)) for i in range(20)]
    write_tsv(tmp_path, "train", ("sentence", "label"), [*rows, ("a cat", "7"), *rows])
    changes = {"kind": "tsv", "dir": tmp_path, "split": "train", "fields__text": "sentence"}
    changes = {f"data__{name}": value for name, value in changes.items()}
    config = tuned("glue", "", num_classes=2, **changes)
    batches = train.open_batches(config, train.build(config), 0)
    with pytest.raises(UserError, match="record 20 has the label 7, but config.num_classes=2") as e:
        for _ in range(10):
            next(batches)
    one_line(e)


def test_an_utterance_too_long_to_be_scored(tmp_path):
    config = tuned("ctc", "", steps=0, audio__eval_length=10_000)
    with pytest.raises(UserError, match=r"record \d+: \d+ samples .*eval_length=10000") as error:
        train.train(config, tmp_path / "run")
    one_line(error)


def test_utterances_all_too_long_to_be_learned(tmp_path):
    config = tuned("ctc", "", audio__length=10_000)
    with pytest.raises(
        UserError, match=r"none of the 16 records .* config.audio.length=10000"
    ) as e:
        train.train(config, tmp_path / "run")
    one_line(e)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("glue.py:task=wnli", "task=wnli is unknown"),
        ("glue.py:version=3", "version=3 is unknown"),
        ("glue.py:size=huge", "size=huge is unknown"),
        ("ctc.py:recipe=base_5h", "recipe=base_5h is unknown"),
        ("ctc.py:size=small", "size=small is unknown"),
        ("data2vec_image.py:size=huge", "size=huge is unknown"),
        ("data2vec2_image.py:size=small", "size=small is unknown"),
    ],
)
def test_unknown_options(spec, words):
    with pytest.raises(UserError, match=words) as error:
        configs.load(f"configs/finetune/{spec}")
    one_line(error)


def test_letters_of_the_score_follow_those_of_the_model():
    config = configs.load("configs/finetune/ctc.py")
    configs.override(config, [("letters", "abc")])
    assert config.eval.wer.letters == "abc"
    saved = configs.from_dict(config.to_dict())
    assert saved.eval.wer.letters == saved.letters == "abc"
    configs.check_resume(saved, config, Path("run"))
