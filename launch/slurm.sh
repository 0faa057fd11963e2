#!/usr/bin/env bash
# bivl on a SLURM cluster, one process for each GPU. Give sbatch what your cluster wants, as in
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --partition=gpu --time=24:00:00 \
#     launch/slurm.sh --config=configs/pretrain/bivl.py --workdir=/shared/runs/first
# Two minutes before its time is over, and when it is preempted, the job saves; then it queues
# itself again and resumes. It ends when it is done, or fails twice in a row without an update.
#SBATCH --job-name=bivl
#SBATCH --output=bivl-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no SLURM job; submit it: sbatch launch/slurm.sh ..."
# SLURM runs a copy of this file: the tree is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -d bivl ]] || fail "$PWD holds no bivl/; call sbatch in the folder of the repository"
workdir=
for argument in "$@"; do
  [[ $argument != --workdir=* ]] || workdir=${argument#--workdir=}
done
[[ -n $workdir ]] || fail "--workdir=DIR is missing; name a folder that all nodes share"
gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-0}
if ((gpus && tasks && gpus != tasks)); then
  fail "--ntasks-per-node=$tasks but $gpus GPUs a node; every GPU wants a task of its own"
fi
if [[ -f .venv/bin/activate && -z ${VIRTUAL_ENV:-} ]]; then
  # shellcheck disable=SC1091 # launch/setup.sh makes it
  source .venv/bin/activate
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled} PYTHONUNBUFFERED=1

updates() {
  if [[ -f $workdir/metrics.jsonl ]]; then wc -l < "$workdir/metrics.jsonl"; else echo 0; fi
}

trap : TERM # for the programs; this script stays to queue the job again
restarts=${SLURM_RESTART_COUNT:-0}
before=$(updates)
code=0
if ((restarts == 0)); then
  srun python -m bivl.preflight --workdir="$workdir" || code=$?
  ((code == 0)) || exit "$code"
fi
srun --kill-on-bad-exit=1 python -m bivl.train "$@" || code=$?
echo "== ended with code $code"
case $code in
  0 | 2 | 3) exit "$code" ;; # done; bad input; a guard stopped the run
esac
if ((code != 143 && restarts && $(updates) == before)); then
  fail "the run fails before its first update, again; see above"
fi
scontrol requeue "$SLURM_JOB_ID"
