"""Stand-ins for gcloud, sbatch's srun and the like: they record their calls and play a cloud."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Slices are files in state/ that hold their state; every host of a slice is a folder in hosts/, and
# what is sent to it runs there, with a hostname of its own.
GCLOUD = r"""
cd "$CLOUD"
echo "gcloud $*" >> calls
if [[ -f offline ]]; then
  echo "ERROR: gcloud crashed (ConnectionError): Max retries exceeded" >&2
  exit 1
fi
shift 2
group=$1 verb=$2 name=$3
shift 3
value() { for a in "$@"; do [[ $a != "$key"=* ]] || { echo "${a#*=}"; return; }; done; }
absent() {
  echo "ERROR: (gcloud.compute.tpus.$group.$verb) NOT_FOUND: Resource '$name' was not found." >&2
  exit 1
}
hosts() { for i in 0 1; do mkdir -p "hosts/$1/$i"; echo "$i"; done; }
case $group/$verb in
  tpu-vm/create)
    [[ ! -f refuse ]] || { rm refuse; echo "no capacity" >&2; exit 1; }
    echo READY > "state/$name"; hosts "$name" ;;
  tpu-vm/describe) [[ -f state/$name ]] || absent; cat "state/$name" ;;
  tpu-vm/delete) rm -r "state/$name" "hosts/$name" ;;
  queued-resources/create)
    key=--node-count count=$(value "$@") key=--node-prefix prefix=$(value "$@")
    key=--node-id id=$(value "$@")
    echo "${QUEUE_STATES:-WAITING_FOR_RESOURCES PROVISIONING ACTIVE}" > "queue-$name"
    if [[ $id ]]; then echo "$id"; else seq -f "$prefix-%g" 0 $((count - 1)); fi > "nodes-$name" ;;
  queued-resources/describe)
    [[ -f queue-$name ]] || absent
    read -r now rest < "queue-$name"
    [[ -z $rest ]] || echo "$rest" > "queue-$name"
    if [[ $now == ACTIVE ]]; then
      while read -r node; do
        [[ -f state/$node ]] || { echo READY > "state/$node"; hosts "$node"; }
      done < "nodes-$name"
    fi
    echo "$now" ;;
  queued-resources/delete)
    while read -r node; do rm -rf "state/$node" "hosts/$node"; done < "nodes-$name"
    rm "queue-$name" "nodes-$name" ;;
  tpu-vm/scp) for host in "hosts/${1%%:*}"/*; do cp "$name" "$host/${1#*:}"; done ;;
  tpu-vm/ssh)
    key=--command command=$(value "$@") key=--worker worker=$(value "$@") code=0 jobs=()
    echo $$ > "connection-$name"
    for host in "hosts/$name"/*; do
      [[ $worker == all || $worker == "${host##*/}" ]] || continue
      (cd "$host" && HOME=$PWD HOST="$name-w-${host##*/}" bash -c "$command") &
      jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || code=$((code ? code : $?)); done
    exit "$code" ;;
  *) echo "unknown: $group $verb" >&2; exit 99 ;;
esac
"""
STUBS = {
    "gcloud": GCLOUD,
    "hostname": 'echo "hostname $HOST" >> "$CLOUD/calls"; echo "$HOST"',
    # The server that tells a machine about itself: a notice is a file of the cloud.
    "curl": 'cat "$CLOUD/notices/$HOST-${*: -1:1}" 2> /dev/null || cat "$CLOUD/notices/$HOST" '
    "2> /dev/null || true",
    "python": 'echo "python $*" >> "$CLOUD/calls"; cat > /dev/null < /dev/null',
    "srun": 'echo "srun $*" >> "$CLOUD/calls"; read -r code rest < "$CLOUD/codes"\n'
    'echo "$rest" > "$CLOUD/codes"; exit "$code"',
    "scontrol": 'echo "scontrol $*" >> "$CLOUD/calls"',
}
STUBS["python3"] = STUBS["python"]


class Cloud:
    """A folder that plays a cloud, and scripts that run against it."""

    def __init__(self, folder: Path):
        self.folder, self.tree = folder, ROOT
        for name in ("bin", "venv/bin", "state", "hosts", "notices"):
            (folder / name).mkdir(parents=True)
        for name, text in STUBS.items():
            self.stub(name, text)
        (folder / "venv/bin/python").symlink_to(folder / "bin/python")
        self.env = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "CLOUD": str(folder),
            "VIRTUAL_ENV": str(folder / "venv"),
            "HOME": str(folder),
            "HOST": "laptop",
            "NOTICE_EVERY": "0.1",
            "WAIT": "0",
        }

    def stub(self, name: str, text: str) -> None:
        """A command on the PATH."""
        file = self.folder / "bin" / name
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)

    def program(self, text: str) -> str:
        """The path of a program for hosts to run."""
        self.stub("program", text)
        return str(self.folder / "bin" / "program")

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen:
        """Starts a script of launch/."""
        command = ["bash", str(self.tree / "launch" / script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
        return subprocess.Popen(command, env=self.env | env, text=True, **pipes)

    def run(self, script: str, *arguments: str, code: int = 0, typed="", **env: str):
        """Runs a script of launch/ to its end, which must be `code` -> (stdout, stderr)."""
        process = self.start(script, *arguments, **env)
        out, err = process.communicate(typed, timeout=300)
        assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
        return out, err

    def calls(self, *words: str) -> list[str]:
        """The recorded calls that have all of these words."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture
def cloud(tmp_path):
    """A cloud with nothing in it."""
    return Cloud(tmp_path / "cloud")
