#!/usr/bin/env bash
# What every host of a TPU slice does; launch/tpu.sh copies the tree there and calls this.
#   setup [BUCKET]      installs bivl with jax for TPU, mounts the bucket at bucket/
#   run [--] PROGRAM    starts the program, unless one runs, so that it outlives this connection
#   follow [quiet]      shows its log until it ends, and ends with its code (130: it was stopped)
#   stop                ends it as a preemption would: it saves
#   status              one line
#   running             whether a program runs: the exit code
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install_python() { # bivl needs 3.11, the system images of TPU VMs have 3.10
  local name
  for name in python3 python3.11 python3.12 python3.13; do
    "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && return
  done
  sudo add-apt-repository -y ppa:deadsnakes/ppa > /dev/null
  sudo apt-get install -yqq python3.11 python3.11-venv > /dev/null
}

mount_bucket() {
  mountpoint -q bucket && return
  if ! command -v gcsfuse > /dev/null; then
    local site=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get update -qq
    sudo apt-get install -yqq gcsfuse > /dev/null
  fi
  mkdir -p bucket
  # A checkpoint is whole when its folder gets its name; without this a folder cannot be renamed.
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 "$1" bucket
}

setup() {
  install_python
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  python -m pip install --quiet --disable-pip-version-check \
    "jax[tpu]==$(python -c 'import importlib.metadata as m; print(m.version("jax"))')"
  if [[ -n ${1:-} ]]; then mount_bucket "$1"; fi
  echo "$(hostname): bivl is installed"
}

running() { # whether run/pid is a process, and one of this script
  [[ -f run/pid ]] && grep -qs worker.sh "/proc/$(< run/pid)/cmdline"
}

ask() { # the server that tells a virtual machine about itself
  local site=http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance
  curl -sf -m 3 -H "Metadata-Flavor: Google" "$site/$1" || true
}

run() {
  [[ ${1:-} != -- ]] || shift
  mkdir -p run
  if ! running; then
    rm -f run/code run/stopped run/guarded
    nohup setsid bash launch/worker.sh guard "$@" > run/log 2>&1 < /dev/null &
    echo $! > run/pid
    until [[ -f run/guarded ]] || ! running; do sleep 0.1; done # from then on `stop` may come
  fi
}

notices() { # hands those of this host to a process as SIGTERM, so that it saves
  while kill -0 "$1" 2> /dev/null; do
    if [[ $(ask preempted) == TRUE || $(ask maintenance-event) == TERMINATE* ]]; then
      echo "$(hostname) is about to be taken away"
      kill -TERM "$1" || true
      break
    fi
    sleep "${NOTICE_EVERY:-5}"
  done
}

guard() { # runs the program, and keeps its exit code
  local child="" asked="" code=0
  trap 'asked=1; [[ -z $child ]] || kill -TERM $child' TERM
  # shellcheck disable=SC1091 # setup has made it
  if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/run/compiled}
  export PYTHONUNBUFFERED=1
  touch run/guarded # no $(...) from here on: bash 5.2 cannot parse one when the trap comes
  "$@" &
  child=$!
  [[ -z $asked ]] || kill -TERM "$child"
  notices "$child" &
  while true; do # a signal ends `wait` before the program has ended
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2> /dev/null || break
  done
  echo "$code" > run/code
}

follow() {
  local log=run/log
  [[ ${1:-} != quiet ]] || log=/dev/null
  tail -n +1 -f --pid="$(< run/pid)" "$log"
  [[ ! -f run/stopped ]] || exit 130
  local code
  code=$(cat run/code 2> /dev/null || echo 1) # none: killed together with its guard
  [[ $code == 0 ]] || tail -n 3 run/log | sed "s/^/$(hostname): /" >&2
  exit "$code"
}

stop() {
  running || { echo "$(hostname): nothing runs" && return; }
  touch run/stopped
  kill -TERM "$(< run/pid)"
  tail -f --pid="$(< run/pid)" /dev/null
  echo "$(hostname): ended with code $(cat run/code)"
}

status() {
  local what="nothing has run"
  if running; then what=runs; elif [[ -f run/code ]]; then what="ended with code $(< run/code)"; fi
  echo "$(hostname): $what: $(tail -n 1 run/log 2> /dev/null || true)"
}

"$@"
