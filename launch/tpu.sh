#!/usr/bin/env bash
# bivl on Cloud TPU slices, by gcloud. `launch/tpu.sh help` says how; docs/pods.md shows a whole run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat << 'HELP'
launch/tpu.sh COMMAND [FLAGS] [-- PROGRAM ...]

  create   a TPU VM (with --slices=N or --queue: what `queue` does)
  queue    asks for N slices as a queued resource and waits until they are there
  setup    copies this tree to every host, installs it, mounts the bucket; again after changes: it
           removes what it had copied, and nothing that was written there
  run      runs PROGRAM on every host and follows it, also again after the connection broke; after
           a preemption or a failure it recreates what is gone and runs the same PROGRAM, which
           resumes; while gcloud gives no answer it waits
  logs     follows the log of one host (--worker, default 0)
  status   the state of the slices, and whether a program runs
  stop     ends the program as a preemption would: the state is saved
  delete   deletes the slices and the request for them; asks first unless --yes
  recreate deletes what is left, creates and sets up again

  launch/tpu.sh create --name=pod --zone=us-east5-b --type=v6e-32 --spot
  launch/tpu.sh setup  --name=pod --zone=us-east5-b --bucket=my-bucket
  launch/tpu.sh run    --name=pod --zone=us-east5-b --type=v6e-32 --spot --bucket=my-bucket -- \
    python -m bivl.train --config=configs/pretrain/bivl.py --workdir=bucket/runs/first

flag               variable   meaning
--name=NAME        NAME       of the slice (several: NAME-0, NAME-1, ...)
--zone=ZONE        ZONE       as in us-east5-b
--project=PROJECT  PROJECT    default: gcloud's own
--type=TYPE        TYPE       as in v4-32, v5litepod-64, v5p-128, v6e-256
--slices=N         SLICES     default 1; more are connected over the network and queued together
--runtime=VERSION  RUNTIME    default: what fits the type
--spot             SPOT=1     cheaper, may be taken away at any time
--preemptible      PREEMPTIBLE=1   the older kind, which ends after a day; one slice, not queued
--reserved         RESERVED=1 from a reservation
--queue            QUEUE=1    by queued resource, also for one slice
--network=NET      NETWORK    and --subnetwork=SUB, SUBNETWORK: default gcloud's own
--bucket=BUCKET    BUCKET     mounted at ~/bivl/bucket of every host
--worker=I         WORKER     host to show the log of; --slice=I, SLICE its slice
--retries=N        RETRIES    how often `run` starts again, default 1000 with --spot or
                              --preemptible, else 3; 0: never
--wait=SECONDS     WAIT       between two looks at a request or before a new start, default 30
--yes              YES=1      no question
HELP
}

fail() { # what is wrong; the cure
  echo "error: $*" >&2
  exit 2
}

say() { echo "== $*"; }

# What the flags say, over what the environment says.

NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} TYPE=${TYPE:-} SLICES=${SLICES:-1}
RUNTIME=${RUNTIME:-} SPOT=${SPOT:-} PREEMPTIBLE=${PREEMPTIBLE:-} RESERVED=${RESERVED:-}
QUEUE=${QUEUE:-} NETWORK=${NETWORK:-} SUBNETWORK=${SUBNETWORK:-} BUCKET=${BUCKET:-}
WORKER=${WORKER:-0} SLICE=${SLICE:-0} RETRIES=${RETRIES:-} WAIT=${WAIT:-30} YES=${YES:-}
program=()

parse() {
  local flag name
  while (($#)); do
    flag=$1
    shift
    case $flag in
      --) program=("$@") && break ;;
      -h | --help) usage && exit 0 ;;
      --spot | --preemptible | --reserved | --queue | --yes)
        name=${flag#--} && declare -g "${name^^}=1" ;;
      --name=* | --zone=* | --project=* | --type=* | --slices=* | --runtime=* | --network=* | \
        --subnetwork=* | --bucket=* | --worker=* | --slice=* | --retries=* | --wait=*)
        name=${flag%%=*} name=${name#--} && declare -g "${name^^}=${flag#*=}" ;;
      --*) fail "flag $flag is unknown or has no value; see launch/tpu.sh help" ;;
      *) fail "argument '$flag' is not expected here; the program to run comes after --" ;;
    esac
  done
}

check() { # the variables that the command needs
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || fail "--${name,,} is missing; pass --${name,,}=... or set $name"
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,47}[a-z0-9])?$ ]] ||
    fail "--name=$NAME must be small letters, digits and -, from a letter on"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$ZONE is no zone; as in us-east5-b"
  [[ -z $TYPE || $TYPE =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] ||
    fail "--type=$TYPE is no accelerator type; as in v4-32, v5litepod-64, v5p-128, v6e-256"
  [[ -z $BUCKET || $BUCKET =~ ^[a-z0-9][-_.a-z0-9]+$ ]] ||
    fail "--bucket=$BUCKET must be the name alone, without gs:// and folders"
  [[ $SLICES =~ ^[1-9][0-9]{0,3}$ ]] || fail "--slices=$SLICES must be a number from 1"
  for name in WORKER SLICE WAIT; do
    [[ ${!name} =~ ^[0-9]{1,6}$ ]] || fail "--${name,,}=${!name} must be a whole number"
  done
  [[ -z $RETRIES || $RETRIES =~ ^[0-9]{1,6}$ ]] || fail "--retries=$RETRIES must be a whole number"
  ((SLICE < SLICES)) || fail "--slice=$SLICE must be less than --slices=$SLICES"
  if [[ -n $PREEMPTIBLE ]] && { [[ -n $SPOT$QUEUE ]] || ((SLICES > 1)); }; then
    fail "--preemptible is for one slice without a queue; use --spot"
  fi
  [[ -z $SPOT || -z $RESERVED ]] || fail "--spot and --reserved exclude each other; pass one"
  command -v gcloud > /dev/null || fail "gcloud is not on PATH; install the Google Cloud CLI"
}

tpus() { # gcloud compute tpus, in this zone and project
  gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

queued() { [[ -n $QUEUE ]] || ((SLICES > 1)); }

nodes() { # the names of the slices
  local i
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

runtime() { # the system image; names are Google's, see docs/pods.md
  case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

look() { # what `describe` says; ABSENT only if it says that, a laptop may be without connection
  local errors
  { errors=$(tpus "$@" 2>&1 >&3); } 3>&1 && return
  if [[ $errors == *NOT_FOUND* ]]; then echo ABSENT && return; fi
  echo "$errors" | tail -n 3 >&2
  echo UNKNOWN
}

node_state() { look tpu-vm describe "$1" --format='value(state)'; }

queue_state() { look queued-resources describe "$NAME" --format='value(state.state)'; }

condition() { # of all slices: READY, GONE, UNKNOWN, or COMING where time makes one of the others
  local node found=READY
  for node in $(nodes); do
    case $(node_state "$node") in
      READY) ;;
      ABSENT | PREEMPTED | TERMINATED | STOPPED) found=GONE ;;
      UNKNOWN) echo UNKNOWN && return ;;
      *) [[ $found == GONE ]] || found=COMING ;;
    esac
  done
  if [[ $found != READY ]] && queued; then
    case $(queue_state) in
      ABSENT | ACTIVE) ;;
      FAILED | SUSPENDED) found=GONE ;;
      UNKNOWN) found=UNKNOWN ;;
      *) found=COMING ;; # it waits in the queue, and would lose its place
    esac
  fi
  echo "$found"
}

# The commands.

create_one() {
  say "creating $NAME: $TYPE in $ZONE"
  tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="${RUNTIME:-$(runtime)}" \
    ${SPOT:+--spot} ${PREEMPTIBLE:+--preemptible} ${RESERVED:+--reserved} \
    ${NETWORK:+--network="$NETWORK"} ${SUBNETWORK:+--subnetwork="$SUBNETWORK"}
}

create_queued() {
  local state which=(--node-id="$NAME")
  ((SLICES == 1)) || which=(--node-count="$SLICES" --node-prefix="$NAME")
  while state=$(queue_state) && [[ $state == UNKNOWN ]]; do sleep "$WAIT"; done
  if [[ $state == ABSENT ]]; then
    say "queueing $NAME: $SLICES x $TYPE in $ZONE"
    tpus queued-resources create "$NAME" "${which[@]}" --accelerator-type="$TYPE" \
      --runtime-version="${RUNTIME:-$(runtime)}" ${SPOT:+--spot} ${RESERVED:+--reserved} \
      ${NETWORK:+--network="$NETWORK"} ${SUBNETWORK:+--subnetwork="$SUBNETWORK"}
  fi
  while state=$(queue_state) && [[ $state != ACTIVE ]]; do
    case $state in
      FAILED | SUSPEND* | ABSENT)
        echo "error: the request $NAME is $state; launch/tpu.sh status says why" >&2
        return 1 ;;
    esac
    say "$NAME is $state"
    sleep "$WAIT"
  done
  say "$NAME is ACTIVE"
}

create() { if queued; then create_queued; else create_one; fi; }

delete() {
  if queued; then
    tpus queued-resources delete "$NAME" --force --quiet
  else
    tpus tpu-vm delete "$NAME" --quiet
  fi
}

recreate() { # whatever is left goes first: a slice that was taken away cannot be started again
  local state
  if queued; then state=$(queue_state); else state=$(node_state "$NAME"); fi
  [[ $state != UNKNOWN ]] || fail "gcloud does not say what $NAME is; see above"
  [[ $state == ABSENT ]] || delete
  create
  setup
}

on_hosts() { # a command, on all hosts of all slices at once; %SLICE% is the slice's number
  local node job code=0 slice=0 jobs=()
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker=all --command="${1//%SLICE%/$slice}" < /dev/null &
    jobs+=($!)
    slice=$((slice + 1))
  done
  for job in "${jobs[@]}"; do
    wait "$job" || code=$((code ? code : $?)) # the first failure is the exit code
  done
  return "$code"
}

setup() {
  local archive node file
  git rev-parse --show-toplevel > /dev/null 2>&1 || fail "this folder is no git checkout; clone bivl"
  archive=$(mktemp)
  say "copying this tree" # what git tracks or does not ignore, as it is now
  git ls-files -z --cached --others --exclude-standard -- . ":!run" ":!bucket" |
    while IFS= read -rd '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
    tar czf "$archive" --null --files-from=-
  for node in $(nodes); do
    tpus tpu-vm scp "$archive" "$node:bivl.tar.gz" --worker=all
  done
  rm -f "$archive"
  say "installing"
  on_hosts "mkdir -p bivl/run && cd bivl || exit
    if bash launch/worker.sh running 2> /dev/null; then
      echo \"error: a program runs on \$(hostname); end it first: launch/tpu.sh stop\" >&2
      exit 2
    fi
    if [[ -f run/tree ]]; then xargs -d '\n' rm -f -- < run/tree; fi &&
    tar tzf ../bivl.tar.gz --quoting-style=literal > run/tree &&
    tar xzf ../bivl.tar.gz && bash launch/worker.sh setup $BUCKET"
}

programs() { # RUNS or RESTS where that is so on all hosts; else neither
  local answers ask="bash bivl/launch/worker.sh running 2> /dev/null && echo RUNS || echo RESTS"
  answers=$(on_hosts "$ask") || return 0
  grep -xE "RUNS|RESTS" <<< "$answers" | sort -u | tr -d '\n'
}

settle() { # waits until the slices are READY or GONE: sets `state`, and clears `installed`
  while state=$(condition) && [[ $state != READY && $state != GONE ]]; do
    say "$NAME is $state"
    [[ $state == UNKNOWN ]] || installed= # it may come back without its disk or mounts
    sleep "$WAIT"
  done
  [[ $state == READY ]] || installed=
}

again() { # makes what is gone, and what is there fit to run
  if [[ $state == GONE ]]; then
    [[ -n $TYPE ]] || fail "$NAME is not there; pass --type so that it can be created"
    say "recreating $NAME (try $tries)"
    # A process of its own: within `if` and `||` bash would go on after a command that failed.
    if bash launch/tpu.sh recreate; then installed=1; fi
  elif [[ -z $installed ]]; then
    case $(programs) in
      RUNS) installed=1 ;; # the tree under it stays as it is
      RESTS) if bash launch/tpu.sh setup; then installed=1; fi ;;
    esac
  fi
}

run() {
  local code command start state tries=0 quick=0 installed=1
  ((${#program[@]})) || fail "there is nothing to run; put the program after --"
  [[ -n $RETRIES ]] || RETRIES=$([[ -n $SPOT$PREEMPTIBLE ]] && echo 1000 || echo 3)
  # Only the first host of the first slice shows its log: all others say the same.
  command="cd bivl && bash launch/worker.sh run -- $(printf '%q ' "${program[@]}") &&
    bash launch/worker.sh follow \$([[ %SLICE%\$(hostname) == 0*-w-0 ]] || echo quiet)"
  while true; do
    settle
    if [[ -n $installed ]]; then
      say "running: ${program[*]}"
      start=$SECONDS code=0
      on_hosts "$command" || code=$?
      ((code)) || { say "done" && return; }
      say "ended with code $code after $((SECONDS - start)) s"
      if [[ $(condition) == READY ]]; then
        case $code in # 2: a mistake, 3: a guard, 130: `stop`. None gets better by itself.
          2 | 3 | 130) return "$code" ;;
          143 | 255) ;; # a notice of the host; a broken connection
          *) quick=$((SECONDS - start < 600 ? quick + 1 : 0)) ;; # the absent get 300
        esac
      fi
      ((quick < 3)) || { say "it failed at its start three times; see logs" && return "$code"; }
    fi
    ((tries < RETRIES)) || { say "no tries are left" && return 1; }
    tries=$((tries + 1))
    sleep "$WAIT"
    settle
    again
  done
}

stop() { on_hosts "cd bivl && bash launch/worker.sh stop"; }

logs() {
  local node=$NAME
  ((SLICES == 1)) || node=$NAME-$SLICE
  tpus tpu-vm ssh "$node" --worker="$WORKER" --command="tail -n 100 -F bivl/run/log" < /dev/null
}

status() {
  local node
  if queued; then tpus queued-resources describe "$NAME" --format="yaml(name,state)" || true; fi
  for node in $(nodes); do echo "$node: $(node_state "$node")"; done
  [[ $(condition) != READY ]] || on_hosts "cd bivl && bash launch/worker.sh status" || true
}

main() {
  local command=${1:-help}
  (($# == 0)) || shift
  case $command in
    create | queue | recreate) parse "$@" && check NAME ZONE TYPE ;;
    setup | run | logs | status | stop | delete) parse "$@" && check NAME ZONE ;;
    help | -h | --help) usage && return ;;
    *) fail "command $command is unknown; see launch/tpu.sh help" ;;
  esac
  export NAME ZONE PROJECT TYPE SLICES RUNTIME SPOT PREEMPTIBLE RESERVED QUEUE NETWORK SUBNETWORK
  export BUCKET WAIT
  case $command in
    queue) QUEUE=1 && create ;;
    delete)
      if [[ -z $YES ]]; then
        read -rp "delete $(nodes | tr '\n' ' ')in $ZONE? [y/N] " answer || true
        [[ ${answer:-} == [yY] ]] || fail "nothing is deleted; answer y or pass --yes"
      fi
      delete ;;
    *) "$command" ;;
  esac
}

main "$@"
