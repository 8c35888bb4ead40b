#!/usr/bin/env bash
# What one node of a job does: node.sh ROLE COMMAND... (or: node.sh preflight). Started by srun, once on each node.
# COMMAND is completed with what differs from node to node. Settings come from slurm/common.sh by the environment.
# shellcheck disable=SC2086 # lists of nodes are words
set -euo pipefail

NODE=${SLURMD_NODENAME:-$(hostname -s)}

# This node's place in a list of nodes; Slurm's own numbers need not follow it.
index_among() {
  local index=0 host
  for host; do
    [ "$host" != "$NODE" ] || { echo "$index"; return; }
    index=$((index + 1))
  done
  echo "node.sh: $NODE is not one of $*" >&2
  return 1
}

# The first thing that is wrong with this node, as one line; nothing if it is well.
find_fault() {
  [ "$(cat "$DYPO_LOGS/canary" 2>&1)" = "$SLURM_JOB_ID" ] || {
    echo "cannot read $DYPO_LOGS/canary: LOG_ROOT must be on a file system that all nodes share"
    return
  }
  command -v nvidia-smi >/dev/null || {
    echo "no nvidia-smi on $NODE: its GPUs are not checked" >&2
    return
  }
  local listed query=index,ecc.errors.uncorrected.volatile.total,remapped_rows.pending,remapped_rows.failure
  listed=$(timeout 60 nvidia-smi --query-gpu=$query --format=csv,noheader) || {
    echo "nvidia-smi failed: $(tail -n 1 <<<"$listed")"
    return
  }
  local count
  count=$(wc -l <<<"$listed")
  [ "$count" = "$GPUS_PER_NODE" ] || {
    echo "$count of $GPUS_PER_NODE GPUs answer"
    return
  }
  # A driver writes [N/A] or No where there is nothing to tell.
  awk -F ', *' '$2 ~ /^[1-9]/ || $3 ~ /^(Yes|[1-9])/ || $4 ~ /^(Yes|[1-9])/ { print "GPU " $1 " has memory errors: " $0; exit }' \
    <<<"$listed"
}

preflight() {
  local fault
  fault=$(find_fault)
  if [ -n "$fault" ]; then
    echo "$fault"
    echo "$fault" >"$DYPO_LOGS/bad/$NODE"
  else
    echo "$NODE is well"
    touch "$DYPO_LOGS/well/$NODE"
  fi
}

# Ends with 0 and leaves a mark when the run stopped on request: any other status would have srun kill the other nodes.
# How the run ended, for the job's last line, comes from megatron_dypo/launch/torchrun.py in one line.
train() {
  PET_NODE_RANK=$(index_among $DYPO_TRAIN_NODES) # torchrun's --node-rank
  export PET_NODE_RANK
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  export MEGATRON_DYPO_END_FILE=$DYPO_LOGS/ends/$NODE
  local status=0
  "$@" || status=$?
  if [ "$status" = 75 ]; then # the one status of docs/exit_statuses.md after which the same command is started again
    touch "$DYPO_LOGS/stopped"
    status=0
  fi
  exit "$status"
}

# The servers of this node, or this node's part of a server that spans NODES_PER_SERVER of them.
serve() {
  local index hosts spread=()
  index=$(index_among $DYPO_ROLLOUT_NODES)
  if [ "$NODES_PER_SERVER" -gt 1 ]; then
    read -ra hosts <<<"$DYPO_ROLLOUT_NODES"
    local first=${hosts[index - index % NODES_PER_SERVER]}
    # Its parts cannot start again one by one.
    spread=(rollout.servers.max_restarts=0 --server-args
      "--nnodes $NODES_PER_SERVER --node-rank $((index % NODES_PER_SERVER)) --dist-init-addr $first:$((DYPO_PORT + 2))")
  fi
  local status=0
  "$@" --log-dir "$DYPO_LOGS/rollout.$NODE" --first $((index * SERVERS_PER_NODE)) "${spread[@]}" \
    "rollout.servers.host=$NODE" "rollout.servers.port=$((DYPO_PORT + 20 + index * SERVERS_PER_NODE))" || status=$?
  echo "$status" >"$DYPO_LOGS/ended/$NODE"
  exit "$status"
}

# Again when it dies: it keeps nothing, since every refit of the trainer tells it the servers.
route() {
  local restarts=3
  until "$@"; do
    [ "$restarts" -gt 0 ] || exit 1
    echo "node.sh: the router ended; starting it again ($restarts more times)" >&2
    restarts=$((restarts - 1))
  done
}

# Python blocks the signal once it runs; until then it must not kill what starts.
trap '' USR1
case ${1:-} in
  preflight) preflight ;;
  rollout) serve "${@:2}" ;;
  trainer) train "${@:2}" ;;
  router) route "${@:2}" ;;
  *) echo "usage: node.sh preflight | rollout COMMAND... | trainer COMMAND... | router COMMAND..." >&2; exit 2 ;;
esac
