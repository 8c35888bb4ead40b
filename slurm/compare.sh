#!/usr/bin/env bash
# Run the cells of a comparison as a job array; each task trains and evaluates one cell on one node:
#   VENV=/shared/venv megatron-dypo compare comparison.yaml --slurm
# submits this file for the cells that are not done. Submit again to finish cells that were killed. The size of a node and
# limits come from the environment of sbatch (SBATCH_PARTITION, SBATCH_TIMELIMIT, …). slurm/common.sh explains IMAGE,
# MOUNTS, VENV and MAX_REQUEUES.
#SBATCH --job-name=compare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#SBATCH --signal=B:USR1@300
set -euo pipefail

DYPO_HOME=${DYPO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
CONFIG=${1:-}

# Slurm runs a copy of this file, from another folder.
[ -f "$DYPO_HOME/slurm/common.sh" ] || {
  echo "dypo: error: DYPO_HOME=$DYPO_HOME has no slurm/common.sh: submit from the repository's root, or set DYPO_HOME" >&2
  exit 2
}
# shellcheck source=slurm/common.sh
source "$DYPO_HOME/slurm/common.sh"

[ -n "$CONFIG" ] || fail "name the file of the comparison: megatron-dypo compare FILE --slurm submits this script with it"
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "not a task of a job array: submit with megatron-dypo compare FILE --slurm"
read_settings
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONUNBUFFERED=1
export PYTHONPATH=$DYPO_HOME${PYTHONPATH:+:$PYTHONPATH}

command=("$PYTHON" -m megatron_dypo.cli compare "$CONFIG" --cell "$SLURM_ARRAY_TASK_ID")
[ "${#CONTAINER[@]}" = 0 ] || command=(srun --nodes=1 --ntasks=1 "${CONTAINER[@]}" "${command[@]}")
run_cell() { # leaves the status of the command in $status
  "${command[@]}" &
  cell=$! status=0
  wait "$cell" || status=$?
  while [ "$status" -gt 128 ] && kill -0 "$cell" 2>/dev/null; do # a trap ends a wait
    status=0
    wait "$cell" || status=$?
  done
  # The signal may have come just after the command ended. 127: its status is no longer known.
  local own=0
  wait "$cell" || own=$?
  [ "$own" = 127 ] || status=$own
}

# The run finishes its step and saves. SIGTERM comes when the job is cancelled: then the job must not be requeued. If the
# site gives a grace time, SIGTERM also comes before a preemption: then the job is still running.
is_cancelled=0
trap 'kill -USR1 "$cell" 2>/dev/null || true' USR1
trap 'case $(job_state) in RUNNING | "") ;; *) is_cancelled=1 ;; esac; kill -USR1 "$cell" 2>/dev/null || true' TERM
run_cell
if [ "$status" = 73 ]; then
  # A task that was killed on another node may have left a lock. It is free after 3 minutes without a sign of life.
  say "cell $SLURM_ARRAY_TASK_ID is in use: trying once more in 210 s, in case that its task was killed"
  sleep 210
  run_cell
fi
[ "$status:$is_cancelled" = 75:0 ] || exit "$status"
say "cell $SLURM_ARRAY_TASK_ID was stopped and saved: it goes back to the queue"
scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" || fail "scontrol requeue failed; submit again to go on"
