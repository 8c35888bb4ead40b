#!/usr/bin/env bash
# DYPO on a 70B-class model, 8 trainer nodes and 4 rollout nodes of 8 GPUs:
#   IMAGE=/shared/dypo.sqsh MOUNTS=/shared:/shared sbatch slurm/dypo_70b.sh run.dir=/shared/runs/a model.hf_path=/shared/...
# Arguments are overrides of CONFIG; the settings in the environment are listed in slurm/common.sh and docs/slurm.md.
#SBATCH --job-name=dypo_70b
#SBATCH --nodes=12
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@300
#SBATCH --dependency=singleton
set -euo pipefail

DYPO_HOME=${DYPO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
CONFIG=${CONFIG:-examples/llama3_70b/config.yaml}
ROLLOUT_NODES=${ROLLOUT_NODES:-4}
DEFAULT_NODES=12 # nodes of a dry run (DRY_RUN=1), as in the header

# Slurm runs a copy of this file, from another folder.
[ -f "$DYPO_HOME/slurm/common.sh" ] || {
  echo "dypo: error: DYPO_HOME=$DYPO_HOME has no slurm/common.sh: submit from the repository's root, or set DYPO_HOME" >&2
  exit 2
}
# shellcheck source=slurm/common.sh
source "$DYPO_HOME/slurm/common.sh"
run_job "$@"
