"""Finding, saving, restoring: on other device counts, in part, and past torn checkpoints."""

import logging
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bivl.core import checkpoint, sharding
from bivl.core import config as configs
from bivl.core import state as states
from bivl.core.errors import UserError

TX = optax.adam(1e-3)
CONFIG = configs.from_dict(
    {key: {} for key in ("model", "data", "mesh", "eval")}
    | {"objective": "tiny", "modality": "none", "pair": (1, 2)}
)


def objective(width=64, hidden=64, teacher=True):
    """All that a state needs of an objective: `init`."""

    def init(key):
        box = lambda x, *axes: nn.LogicallyPartitioned(x, axes)  # noqa: E731
        params = {
            "embed": {"kernel": box(jax.random.normal(key, (3, width)), None, "embed")},
            "mlp": {
                "kernel": box(jax.random.normal(key, (width, hidden)), "embed", "mlp"),
                "bias": box(jnp.arange(hidden, dtype=jnp.float32), None),
            },
        }
        copy = {"mlp": jax.tree.map(jnp.copy, params["mlp"])} if teacher else {}
        return params, copy, {"count": jnp.float32(3)}

    return types.SimpleNamespace(init=init)


def mesh(count):
    sizes = {"data": 1, "fsdp": -1, "tensor": 2 if count > 1 else 1}
    return sharding.make_mesh(sizes, jax.devices()[:count])


def make(seed=0, count=8, step=0, **sizes):
    state = states.create(objective(**sizes), TX, mesh(count), seed)
    return state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding))


def abstract(count=8, **sizes):
    return states.abstract(objective(**sizes), TX, mesh(count))


def numbers(tree):
    return jax.tree.map(np.asarray, tree)


def save(workdir, *steps, keep=10, **options):
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep)
    for step in steps:
        checkpoints.save(step, make(seed=step, step=step, **options), CONFIG, wait=True)
    checkpoints.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A workdir with the steps 2 and 10, saved on eight devices."""
    workdir = tmp_path_factory.mktemp("original")
    save(workdir, 2, 10)
    return workdir


@pytest.fixture
def workdir(original, tmp_path):
    """A copy of `original` that a test may damage."""
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_find_the_newest_or_the_named_step(place, original):
    folder = original / "checkpoints"
    assert checkpoint.find(original / place) == folder / "10"  # by number, not by name
    assert checkpoint.find(original / place, 2) == folder / "2"
    assert checkpoint.find(str(original / place)) == folder / "10"


def test_find_one_step(original):
    step = original / "checkpoints" / "2"
    assert checkpoint.find(step) == step and checkpoint.find(step, 2) == step
    with pytest.raises(UserError, match="no checkpoint of step 10"):
        checkpoint.find(step, 10)


def test_find_a_step_under_another_name(original, tmp_path):
    shutil.copytree(original / "checkpoints" / "2", tmp_path / "released")
    assert checkpoint.find(tmp_path / "released") == tmp_path / "released"


def test_find_refuses(original, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.find(tmp_path / "none")
    with pytest.raises(UserError, match=r"no finished checkpoint \(none\)"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[2, 10\]"):
        checkpoint.find(original, 3)


def test_numbered_ignores_what_is_no_number(tmp_path):
    for name in ("7", "12", "7.torn", "3.orbax-checkpoint-tmp", "x"):
        (tmp_path / name).mkdir()
    assert checkpoint.numbered(tmp_path) == [12, 7]
    assert checkpoint.numbered(tmp_path / "none") == []


def data_files(step_dir):
    """The array data, largest file first."""
    files = [p for p in (step_dir / "state").rglob("*") if p.parent.name == "d"]
    return sorted(files, key=lambda p: -p.stat().st_size)


def tear(step_dir, how):
    if how == "empty folder":
        shutil.rmtree(step_dir)
        step_dir.mkdir()
    elif how == "data deleted":
        data_files(step_dir)[0].unlink()
    elif how == "data cut":
        file = data_files(step_dir)[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "tree cut":
        file = next((step_dir / "state" / "d").iterdir())
        file.write_bytes(file.read_bytes()[:10])
    elif how == "metadata cut":
        file = step_dir / "state" / "_METADATA"
        file.write_bytes(file.read_bytes()[:100])
    elif how == "manifest deleted":
        (step_dir / "state" / "manifest.ocdbt").unlink()


TEARS = [
    "empty folder",
    "data deleted",
    "data cut",
    "tree cut",
    "metadata cut",
    "manifest deleted",
]


@pytest.mark.parametrize("how", TEARS)
def test_a_torn_newest_is_passed_over(how, workdir, caplog):
    folder = workdir / "checkpoints"
    assert checkpoint.is_whole(folder / "10")
    tear(folder / "10", how)
    assert not checkpoint.is_whole(folder / "10") and checkpoint.is_whole(folder / "2")
    with caplog.at_level(logging.WARNING, "bivl"):
        assert checkpoint.find(workdir) == folder / "2"
        assert str(folder / "10") in caplog.text
        with pytest.raises(UserError, match=r"no checkpoint of step 10; it has \[2\]"):
            checkpoint.find(workdir, 10)
        caplog.clear()
        checkpoints = checkpoint.Checkpoints(folder, 10)
        state = checkpoints.restore_newest(abstract())
        assert str(folder / "10") in caplog.text
    assert int(state.step) == 2
    # Its number can be saved again, and then it is the newest whole one.
    checkpoints.save(10, make(seed=5, step=10), CONFIG, wait=True)
    checkpoints.close()
    assert checkpoint.find(workdir) == folder / "10"


@pytest.mark.parametrize("how", ["empty folder", "data deleted"])
def test_none_left(how, workdir):
    folder = workdir / "checkpoints"
    for step in ("2", "10"):
        tear(folder / step, how)
    with pytest.raises(UserError, match=r"only unfinished ones: \[10, 2\]"):
        checkpoint.find(workdir)
    checkpoints = checkpoint.Checkpoints(folder, 10)
    with pytest.raises(UserError, match="none of the checkpoints .*10.* can be read"):
        checkpoints.restore_newest(abstract())
    checkpoints.close()
    assert checkpoint.numbered(folder) == [10, 2]  # nothing is removed


def test_wrong_bytes_are_noticed_and_passed_over(workdir, caplog):
    """Damage that leaves every size as it was shows when the arrays are read."""
    folder = workdir / "checkpoints"
    for file in data_files(folder / "10"):
        file.write_bytes(bytes(b ^ 0xFF for b in file.read_bytes()))
    checkpoints = checkpoint.Checkpoints(folder, 10)
    with caplog.at_level(logging.WARNING, "bivl"):
        assert int(checkpoints.restore_newest(abstract()).step) == 2
    checkpoints.close()


def test_torn_ones_do_not_push_out_whole_ones(workdir):
    """With keep=1 a torn step 10 would count as the one to keep."""
    folder = workdir / "checkpoints"
    tear(folder / "10", "data deleted")
    checkpoints = checkpoint.Checkpoints(folder, 1)
    checkpoints.restore_newest(abstract())
    checkpoints.save(3, make(step=3), CONFIG, wait=True)
    checkpoints.close()
    assert checkpoint.find(workdir) == folder / "3"


def test_an_empty_run_restores_nothing(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.restore_newest(abstract()) is None
    checkpoints.close()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_state_of_eight_devices_restores_bit_equal_on(count, original):
    checkpoints = checkpoint.Checkpoints(original / "checkpoints", 10)
    wanted = abstract(count)
    state = checkpoints.restore_newest(wanted)
    checkpoints.close()
    saved = make(seed=10, step=10)
    jax.tree.map(np.testing.assert_array_equal, numbers(state), numbers(saved))
    assert jax.tree.structure(state) == jax.tree.structure(saved)
    jax.tree.map(lambda x, s: x.sharding == s.sharding or pytest.fail(str(s)), state, wanted)
    assert len(state.params["mlp"]["kernel"].sharding.device_set) == count


def test_a_state_of_one_device_restores_on_eight(tmp_path):
    save(tmp_path, 1, count=1)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 10)
    state = checkpoints.restore_newest(abstract(8))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, numbers(state), numbers(make(seed=1, step=1)))


def test_another_architecture_is_named(original):
    checkpoints = checkpoint.Checkpoints(original / "checkpoints", 10)
    words = r"params/mlp/bias has shape \(64,\) in checkpoint .*, this config wants \(4,\)"
    with pytest.raises(UserError, match=words):
        checkpoints.restore_newest(abstract(hidden=4))
    checkpoints.close()
    step_dir = checkpoint.find(original)
    checkpoint.check_shapes(step_dir, abstract().params, "params/")
    more = {"head": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(UserError, match=r"params/head is absent in checkpoint .* wants \(2,\)"):
        checkpoint.check_shapes(step_dir, more, "params/")


def test_restore_part_reads_only_what_is_wanted(original):
    wanted = {"params": {"embed": abstract(1).params["embed"]}}
    found = checkpoint.restore_part(checkpoint.find(original), wanted)
    saved = make(seed=10).params["embed"]
    assert jax.tree.structure(found) == jax.tree.structure({"params": {"embed": saved}})
    np.testing.assert_array_equal(found["params"]["embed"]["kernel"], saved["kernel"])
    assert len(found["params"]["embed"]["kernel"].sharding.device_set) == 1


def test_load_matching_lists_what_was_and_was_not_loaded(original, caplog):
    mine = make(seed=77, hidden=4)
    with caplog.at_level(logging.INFO, "bivl"):
        state = checkpoint.load_matching(checkpoint.find(original), mine)
    saved = make(seed=10)
    np.testing.assert_array_equal(state.params["embed"]["kernel"], saved.params["embed"]["kernel"])
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(state.params["mlp"][name], mine.params["mlp"][name])
    assert "1 of 3 arrays loaded from" in caplog.text
    assert "mlp/kernel keeps its own values (the checkpoint has shape (64, 64))" in caplog.text
    assert "not used from the checkpoint: nothing" in caplog.text
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, numbers(state.opt_state), numbers(mine.opt_state))


def test_an_encoder_of_another_shape_is_refused(original):
    mine = make(seed=77)
    kernel = mine.params["embed"]["kernel"]
    embed = mine.params["embed"] | {"kernel": kernel[:2]}
    mine = mine.replace(params=mine.params | {"embed": embed})
    shapes = (kernel.shape, kernel[:2].shape)
    with pytest.raises(UserError, match="config.init: embed/kernel has shape") as caught:
        checkpoint.load_matching(checkpoint.find(original), mine)
    assert all(str(shape) in str(caught.value) for shape in shapes)


def saved_trees(monkeypatch, **trees):
    """Makes every checkpoint one of these parameters; sizes by path."""
    shapes = {f"params/{path}": (size,) for path, size in flattened(trees)}
    monkeypatch.setattr(checkpoint, "saved_shapes", lambda step_dir: shapes)


def flattened(trees):
    return [(f"{a}/{b}", size) for a, tree in trees.items() for b, size in tree.items()]


def arrays(**trees):
    """Abstract parameters of these sizes."""
    return jax.tree.map(lambda size: jax.ShapeDtypeStruct((size,), jnp.float32), trees)


def test_an_encoder_of_which_nothing_is_found_is_refused(monkeypatch):
    """A trunk of images and one of images and texts share no layer."""
    saved_trees(
        monkeypatch, embed={"cls": 2}, trunk={"blocks": 3, "norm": 2}, decode_trunk={"x": 1}
    )
    both = arrays(embed={"cls": 2}, trunk={"image_blocks": 3, "text_blocks": 3}, heads={"a": 1})
    words = "has trunk/blocks, trunk/norm, this model trunk/image_blocks, trunk/text_blocks: its"
    with pytest.raises(UserError, match=words):
        checkpoint.matching(Path("step"), both)
    towers = arrays(embed={"cls": 2}, image_trunk={"blocks": 3}, text_trunk={"blocks": 3})
    with pytest.raises(UserError, match="this model image_trunk/blocks, text_trunk/blocks: its"):
        checkpoint.matching(Path("step"), towers)
    # A norm that is new is no new encoder, nor is a decoder.
    mine = arrays(trunk={"blocks": 3, "other": 1}, decode_trunk={"y": 1})
    assert checkpoint.matching(Path("step"), mine) == ["trunk/blocks"]


def test_one_tower_may_be_new_and_none_of_another_shape(monkeypatch):
    saved_trees(monkeypatch, image_embed={"patch": 2}, image_trunk={"blocks": 3})
    text = {"text_embed": {"words": 4}, "text_trunk": {"blocks": 3}}
    mine = arrays(image_embed={"patch": 2}, image_trunk={"blocks": 3}, **text)
    found = checkpoint.matching(Path("step"), mine)
    assert found == ["image_embed/patch", "image_trunk/blocks"]
    mine = arrays(image_embed={"patch": 2}, image_trunk={"blocks": 5}, **text)
    with pytest.raises(UserError, match="config.init: image_trunk/blocks has shape"):
        checkpoint.matching(Path("step"), mine)


def test_load_matching_restarts_the_teacher_from_the_student(original, caplog):
    mine = make(seed=77)
    with caplog.at_level(logging.INFO, "bivl"):
        state = checkpoint.load_matching(checkpoint.find(original), mine)
    assert "3 of 3 arrays loaded" in caplog.text
    saved = make(seed=10)
    jax.tree.map(np.testing.assert_array_equal, numbers(state.params), numbers(saved.params))
    jax.tree.map(np.testing.assert_array_equal, numbers(state.teacher), numbers(saved.teacher))
    # A donated step may not find the same buffer twice.
    pointers = [
        {s.data.unsafe_buffer_pointer() for s in tree["mlp"]["kernel"].addressable_shards}
        for tree in (state.teacher, state.params)
    ]
    assert not pointers[0] & pointers[1]


def test_load_matching_names_what_the_checkpoint_has_besides(original, caplog):
    step_dir = checkpoint.find(original)
    state = make(seed=77)
    small = state.replace(params={"embed": state.params["embed"]}, teacher={})
    with caplog.at_level(logging.INFO, "bivl"):
        checkpoint.load_matching(step_dir, small)
    assert "not used from the checkpoint: params/mlp/bias, params/mlp/kernel" in caplog.text


def test_nothing_in_common_is_refused(original):
    state = make(width=32, hidden=4)
    with pytest.raises(UserError, match="no parameter of checkpoint .* check config.init"):
        checkpoint.load_matching(checkpoint.find(original), state)


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 5, keep=2, count=1)
    assert checkpoint.numbered(tmp_path / "checkpoints") == [5, 2]


def test_a_step_is_saved_once(workdir):
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 10)
    checkpoints.save(10, make(seed=99, step=10), CONFIG, wait=True)
    state = checkpoints.restore_newest(abstract())
    checkpoints.close()
    saved = numbers(make(seed=10).params)
    jax.tree.map(np.testing.assert_array_equal, numbers(state.params), saved)


def test_the_config_comes_back(original, workdir):
    step_dir = checkpoint.find(original)
    config = checkpoint.read_config(step_dir)
    assert config == CONFIG and config.pair == (1, 2) and config.is_locked
    broken = checkpoint.find(workdir)
    for text in ("{", "[1]", "3", '{"objective": "x"}', ""):
        (broken / "config" / "metadata").write_text(text)
        with pytest.raises(UserError, match="the config saved in"):
            checkpoint.read_config(broken)
