"""Every script passes shellcheck, and the manifest for GKE is what JobSet takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bivl.core import distributed

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    command = [Path(sys.executable).with_name("shellcheck"), "--external-sources", script]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


# What an object may hold: the types of its keys, those that it must have ending in "!". The part
# of JobSet's, Job's and Pod's schemas that a manifest for training can use.
EXIT_CODES = {"containerName": str, "operator!": str, "values!": [int]}
CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"containerPort!": int}],
    "resources!": {"requests": {"google.com/tpu": int}, "limits!": {"google.com/tpu": int}},
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
VOLUME = {
    "name!": str,
    "emptyDir": {"medium": str},
    "csi": {"driver!": str, "volumeAttributes": {"bucketName": str, "mountOptions": str}},
}
POD = {
    "restartPolicy!": str,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector!": {"*": str},
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "containers!": [CONTAINER],
    "volumes": [VOLUME],
}
JOB = {
    "parallelism!": int,
    "completions!": int,
    "completionMode": str,
    "backoffLimit!": int,
    "podFailurePolicy": {"rules!": [{"action!": str, "onExitCodes": EXIT_CODES}]},
    "template!": {"metadata": {"annotations": {"*": str}}, "spec!": POD},
}
JOBSET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "labels": {"*": str}, "annotations": {"*": str}},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name!": str, "action!": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}


def problems(value, schema, path="jobset"):
    """What of a parsed YAML value is not as a schema says."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [p for i, v in enumerate(value) for p in problems(v, schema[0], f"{path}[{i}]")]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path} is no {schema.__name__}"]
    if not isinstance(value, dict):
        return [f"{path} is no mapping"]
    known = {key.removesuffix("!"): kind for key, kind in schema.items()}
    found = [f"{path} lacks {k[:-1]}" for k in schema if k.endswith("!") and k[:-1] not in value]
    for key, part in value.items():
        kind = known.get(key, known.get("*"))
        found += problems(part, kind, f"{path}.{key}") if kind else [f"{path} knows no {key}"]
    return found


@pytest.fixture(scope="module")
def manifest():
    (found,) = yaml.safe_load_all((ROOT / "launch" / "jobset.yaml").read_text())
    return found


def test_the_manifest_is_a_jobset(manifest):
    assert problems(manifest, JOBSET) == []
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    broken = manifest | {"spec": {"replicatedJobs": [{"name": 1, "repl": 2}]}}
    assert problems(broken, JOBSET) == [
        "jobset.spec.replicatedJobs[0] lacks template",
        "jobset.spec.replicatedJobs[0].name is no str",
        "jobset.spec.replicatedJobs[0] knows no repl",
    ]


def test_the_manifest_restarts_what_was_taken_away_and_not_mistakes(manifest):
    spec = manifest["spec"]
    (job,) = (part["template"]["spec"] for part in spec["replicatedJobs"])
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # JobSet restarts all
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3] and rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "FailJobSet" and spec["failurePolicy"]["maxRestarts"] > 0


def test_the_manifest_fits_together(manifest):
    (part,) = manifest["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert job["completionMode"] == "Indexed"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    ports = {port["containerPort"] for port in container["ports"]}
    assert (
        env["JAX_COORDINATOR_PORT"] == distributed.TPU_PORT and int(distributed.TPU_PORT) in ports
    )
    (script,) = container["args"]
    assert (
        env["BIVL_WAIT_SECONDS"] == "900" and "--seconds=900" in script
    )  # a slice comes back late
    assert "exec python -m bivl.train" in script  # so that SIGTERM reaches Python
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_readme_names_every_script():
    named = (ROOT / "launch" / "README.md").read_text()
    files = [path.name for path in (ROOT / "launch").iterdir() if path.is_file()]
    assert all(f"`{name}" in named for name in files if name != "README.md")
