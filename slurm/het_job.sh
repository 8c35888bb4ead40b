# shellcheck shell=bash
# shellcheck disable=SC2034 # what sources this file uses the variables
# A heterogeneous job, trainer nodes and then rollout nodes, that another tool than slurm/common.sh starts and watches
# (examples/nemo_run): folder, environment and checks. Sourced by its batch script, which sets DYPO_HOME, CONFIG, OVERRIDES
# and the settings of common.sh, and then uses PYTHON, TRAIN, OVERRIDES, SERVER_URLS and DYPO_LOGS.

{ set +vx; } 2>/dev/null # the servers' key is not for a log of what the script does
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

# node.sh leaves the mark when the trainer wrote a checkpoint because it was asked to stop, and one line for each node
# of how the trainer ended.
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
