# shellcheck shell=bash
# shellcheck disable=SC2034 # what sources this file uses the variables
# Prepare a heterogeneous job (trainer nodes, then rollout nodes) that another tool starts and watches (examples/nemo_run):
# folder, environment and checks. Sourced by the tool's batch script, which sets DYPO_HOME, CONFIG, OVERRIDES and the
# settings of common.sh, and then uses PYTHON, TRAIN, OVERRIDES, SERVER_URLS and DYPO_LOGS.

{ set +vx; } 2>/dev/null # no log of executed commands: it would show the servers' key
set -o pipefail
# shellcheck source=slurm/common.sh
source "$DYPO_HOME/slurm/common.sh"
read_settings
mapfile -t TRAIN < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
mapfile -t ROLLOUT < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
NODES=("${TRAIN[@]}" "${ROLLOUT[@]}")
OVERRIDES=("rollout.servers.nodes=$(rollout_nodes)" "${OVERRIDES[@]}")
OVERRIDES+=("parallel.num_processes=$((${#TRAIN[@]} * TRAIN_PER_NODE))")
make_log_folder
set_environment
read_config
mapfile -t urls < <(server_urls)
SERVER_URLS="rollout.servers.urls=[$(join , "${urls[@]}")]"

# node.sh leaves a mark if the trainer wrote a checkpoint because it was asked to stop, and for each node a line that says
# how the trainer ended.
conclude_het_job() {
  local status=$?
  { set +x; } 2>/dev/null
  if [ -f "$DYPO_LOGS/stopped" ]; then
    [ "$(job_state)" = COMPLETING ] || scontrol requeue "$SLURM_JOB_ID"
  elif grep -qsvE '^0 ' "$DYPO_LOGS/ends"/*; then
    echo "dypo: error: $(trainer_end "$status")" >&2
  fi
}
trap conclude_het_job EXIT
set -x
