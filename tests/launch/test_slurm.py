"""launch/slurm.sh as SLURM would start it, with stand-ins for srun and scontrol."""

import pytest

JOB = {"SLURM_JOB_ID": "7"}
TRAIN = "--config=configs/quickstart.py"


def start(cloud, codes, code, *arguments, **env):
    """Runs the job with the exit codes that srun gives in turn."""
    (cloud.folder / "codes").write_text(codes)
    job = JOB | {"SLURM_SUBMIT_DIR": env.pop("tree", ".")} | env
    return cloud.run("slurm.sh", *arguments, code=code, **job)


@pytest.fixture
def tree(cloud):
    """A folder that passes for the repository, and a workdir in it."""
    (cloud.folder / "tree/bivl").mkdir(parents=True)
    (cloud.folder / "run").mkdir()
    return {"tree": str(cloud.folder / "tree")}


@pytest.mark.parametrize(
    ("arguments", "env", "named"),
    [
        ([TRAIN, "--workdir=x"], {"SLURM_JOB_ID": ""}, "sbatch launch/slurm.sh"),
        ([TRAIN], {}, "--workdir=DIR is missing"),
        ([TRAIN, "--workdir=x"], {"tree": "/"}, "holds no bivl/"),
        (
            [TRAIN, "--workdir=x"],
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"},
            "--ntasks-per-node=1 but 8 GPUs",
        ),
    ],
)
def test_a_mistake_is_one_line(cloud, tree, arguments, env, named):
    out, err = start(cloud, "0", 2, *arguments, **(tree | env))
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and named in err
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [("0 0", 0, False), ("0 143", 0, True), ("0 1", 0, True), ("0 3", 3, False), ("2", 2, False)],
)
def test_it_queues_itself_again_where_that_helps(cloud, tree, codes, code, again):
    workdir = f"--workdir={cloud.folder}/run"
    start(cloud, codes, code, TRAIN, workdir, **tree)
    assert cloud.calls("srun", "bivl.preflight", workdir)
    assert bool(cloud.calls("srun", "bivl.train", TRAIN, workdir)) == (codes != "2")
    assert bool(cloud.calls("scontrol requeue 7")) == again


def test_two_failures_without_an_update_end_it(cloud, tree):
    arguments = (TRAIN, f"--workdir={cloud.folder}/run")
    _, err = start(cloud, "1", 2, *arguments, SLURM_RESTART_COUNT="1", **tree)
    assert "before its first update" in err
    cloud.stub("srun", 'echo "{}" >> "$CLOUD/run/metrics.jsonl"; exit 1')
    start(cloud, "", 0, *arguments, SLURM_RESTART_COUNT="1", **tree)
    assert len(cloud.calls("scontrol requeue 7")) == 1
