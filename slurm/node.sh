#!/usr/bin/env bash
# Do the work of one node of a job: node.sh ROLE COMMAND... (or: node.sh preflight). srun starts it once on each node.
# It adds to COMMAND the arguments that differ between nodes. Settings come from slurm/common.sh by the environment.
# shellcheck disable=SC2086 # lists of nodes are words
set -euo pipefail

NODE=${SLURMD_NODENAME:-$(hostname -s)}

# Make a folder that only this user may enter, and print its name. Another user of the node may have made it first, or may have
# been able to write to it: then it is a new one, whose name nobody could know. One call of stat, which follows no link, tells.
private_folder() {
  (umask 077 && mkdir -p "$1") 2>/dev/null || true
  local found
  found=$(LC_ALL=C stat -c '%u %A' "$1") || true
  if [[ $found = "$UID d"????-??-? ]]; then
    chmod 700 "$1"
    echo "$1"
  else
    echo "node.sh: $1 is not a folder that only this user may write to ($found); kernels are compiled anew in another one" >&2
    mktemp -d "$1.XXXXXX"
  fi
}

# Compilers of kernels write many small files. Ranks of many nodes would lock each other out of them on a shared file system.
USUAL_CACHE=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/dypo-cache-$UID
CACHE=$(private_folder "$USUAL_CACHE")
[ "$CACHE" = "$USUAL_CACHE" ] || trap 'rm -rf "$CACHE"' EXIT # nobody would find it again
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$CACHE/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$CACHE/inductor}
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$CACHE/flashinfer}

# Print this node's index in a list of nodes; Slurm's own numbers may have another order.
index_among() {
  local index=0 host
  for host; do
    [ "$host" != "$NODE" ] || { echo "$index"; return; }
    index=$((index + 1))
  done
  echo "node.sh: $NODE is not one of $*" >&2
  return 1
}

# Print the first node of the job that this one would not find by its name. Nodes that are all one host, and so have one
# loopback address, find each other.
find_unknown_name() {
  local host address own
  own=$(addresses_of "$NODE")
  for host in $DYPO_TRAIN_NODES $DYPO_ROLLOUT_NODES ${DYPO_SPARE_NODES:-}; do
    [ "$host" != "$NODE" ] || continue
    address=$(addresses_of "$host")
    if [ -z "$address" ]; then
      echo "$NODE knows no address for $host${NODE_DOMAIN:+.$NODE_DOMAIN}: set NODE_DOMAIN, which is added to the names of nodes"
      return
    elif [ "$address" != "$own" ] && ! grep -qvE '^(127\.|::1$)' <<<"$address"; then
      echo "$NODE looks up $host${NODE_DOMAIN:+.$NODE_DOMAIN} as ${address%%$'\n'*}, which is $NODE itself: correct its /etc/hosts, or set NODE_DOMAIN"
      return
    fi
  done
}

# Print the addresses by which this node knows a node, one a line. A name server may be too busy to answer at once.
addresses_of() {
  local attempt found=''
  for attempt in 1 2 3; do
    [ "$attempt" = 1 ] || sleep 1
    found=$(getent ahosts "$1${NODE_DOMAIN:+.$NODE_DOMAIN}" | cut -d ' ' -f 1 | sort -u) || true
    [ -z "$found" ] || break
  done
  echo "$found"
}

# Print the first problem of this node as one line; print nothing if the node is well.
find_fault() {
  [ "$(cat "$DYPO_LOGS/canary" 2>&1)" = "$SLURM_JOB_ID" ] || {
    echo "cannot read $DYPO_LOGS/canary: LOG_ROOT must be on a file system that all nodes share"
    return
  }
  local unknown
  unknown=$(find_unknown_name)
  [ -z "$unknown" ] || {
    echo "$unknown"
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
  [ "$count" -ge "$GPUS_PER_NODE" ] || {
    echo "$count of $GPUS_PER_NODE GPUs answer"
    return
  }
  [ "$count" = "$GPUS_PER_NODE" ] || echo "$NODE has $count GPUs, GPUS_PER_NODE=$GPUS_PER_NODE are used" >&2
  # The driver writes [N/A] or No for a value that it does not know.
  local errors
  errors=$(awk -F ', *' '$2 ~ /^[1-9]/ || $3 ~ /^(Yes|[1-9])/ || $4 ~ /^(Yes|[1-9])/ { print "GPU " $1 " has memory errors: " $0; exit }' \
    <<<"$listed")
  [ -z "$errors" ] || {
    echo "$errors"
    return
  }
  # Products of matrices on each GPU, and a sum over all of them.
  [ "$PREFLIGHT" = full ] || return 0
  timeout 180 "$DYPO_PYTHON" -m megatron_dypo.launch.preflight --devices "$GPUS_PER_NODE" \
    || echo "the check of its GPUs ended with status $?; see $DYPO_LOGS/preflight.$NODE.log"
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

# If the run stopped on request, end with 0 and leave a mark: with any other status srun would kill the other nodes.
# megatron_dypo/launch/torchrun.py writes one line that says how the run ended, for the last line of the job.
train() {
  PET_NODE_RANK=$(index_among $DYPO_TRAIN_NODES) # torchrun's --node-rank
  export PET_NODE_RANK
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  export MEGATRON_DYPO_END_FILE=$DYPO_LOGS/ends/$NODE
  local status=0
  "$@" || status=$?
  [ "$status:$IS_TERMINATED" != 143:1 ] || status=75 # it had not started far enough to hear the request
  if [ "$status" = 75 ]; then # by docs/exit_statuses.md, the one status after which the same command is started again
    touch "$DYPO_LOGS/stopped"
    status=0
  fi
  exit "$status"
}

# Run the servers of this node, or this node's part of a server that spans NODES_PER_SERVER nodes.
serve() {
  local index hosts spread=()
  index=$(index_among $DYPO_ROLLOUT_NODES)
  if [ "$NODES_PER_SERVER" -gt 1 ]; then
    read -ra hosts <<<"$DYPO_ROLLOUT_NODES"
    local first=${hosts[index - index % NODES_PER_SERVER]}${NODE_DOMAIN:+.$NODE_DOMAIN}
    # The parts of such a server cannot start again one by one.
    spread=(rollout.servers.max_restarts=0 --server-args
      "--nnodes $NODES_PER_SERVER --node-rank $((index % NODES_PER_SERVER)) --dist-init-addr $first:$((DYPO_PORT + 2))")
  fi
  local status=0
  "$@" --log-dir "$DYPO_LOGS/rollout.$NODE" --first $((index * SERVERS_PER_NODE)) "${spread[@]}" \
    "rollout.servers.host=$NODE${NODE_DOMAIN:+.$NODE_DOMAIN}" "rollout.servers.port=$((DYPO_PORT + 20 + index * SERVERS_PER_NODE))" || status=$?
  echo "$status" >"$DYPO_LOGS/ended/$NODE"
  exit "$status"
}

# Run the router, and start it again when it dies, three times in a row; half an hour of work ends a row. It need not keep
# the servers: every refit of the trainer names them.
route() {
  local restarts=3 began=$SECONDS status=0
  until "$@"; do
    status=$?
    [ -z "$IS_TERMINATED" ] || exit 0
    [ $((SECONDS - began)) -lt "${STEADY_S:-1800}" ] || restarts=3
    [ "$restarts" -gt 0 ] || exit "$status"
    echo "node.sh: the router ended; starting it again ($restarts more times)" >&2
    restarts=$((restarts - 1)) began=$SECONDS
  done
}

# Python blocks the signal once it runs. Until then the signal must not kill the starting process.
trap '' USR1
# Before a preemption, and at the job's end, Slurm sends SIGTERM to every process of a step. This shell must outlive COMMAND,
# to leave its marks.
IS_TERMINATED=''
[ "${1:-}" = preflight ] || trap 'IS_TERMINATED=1' TERM
case ${1:-} in
  preflight) preflight ;;
  rollout) serve "${@:2}" ;;
  trainer) train "${@:2}" ;;
  router) route "${@:2}" ;;
  *) echo "usage: node.sh preflight | rollout COMMAND... | trainer COMMAND... | router COMMAND..." >&2; exit 2 ;;
esac
