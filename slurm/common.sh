# shellcheck shell=bash
# Run one job: trainer nodes and rollout nodes in one allocation, a job step for each role, no Ray. Sourced by dypo_*.sh,
# which set DYPO_HOME, CONFIG, ROLLOUT_NODES and DEFAULT_NODES. docs/slurm.md explains how to use it.
#
# Settings, from the environment of sbatch:
#   IMAGE, MOUNTS          container image and mounts (pyxis); or
#   VENV                   a Python environment on the shared file system
#   CONFIG                 YAML file of the run, from DYPO_HOME
#   ROLLOUT_NODES          nodes that serve rollouts; the others train. 0: the run starts its own servers, if it needs any
#   COLOCATED=1            rollout nodes are the first trainer nodes; each node's GPUs are divided
#   GPUS_PER_NODE          8
#   TRAIN_PER_NODE         ranks on each trainer node; GPUS_PER_NODE, or half of it when colocated
#   LOG_ROOT               folder for logs, runs/slurm
#   NODE_DOMAIN            added to the names of nodes in addresses, where the short names are not known everywhere
#   ROUTER=1               put sglang-router in front of the servers, on the first rollout node; else the trainer sends to
#                          the least loaded one
#   GRACE_S                seconds for the trainer to finish its step and save, 270; must be below the lead of --signal
#   MAX_REQUEUES           50
#   MAX_RESTARTS           3; starts of a lost trainer in place, without a new checkpoint in between
#   SPARE_NODES            0; nodes that wait to replace a lost trainer node; needs sbatch --no-kill

declare -A PID=() # role → process of its srun

# shellcheck source=slurm/supervise.sh
source "$DYPO_HOME/slurm/supervise.sh"

say() { echo "dypo: $*"; }

fail() {
  stop_roles
  echo "dypo: error: $*" >&2
  exit 1
}

run_job() {
  OVERRIDES=("$@")
  [ -n "${DRY_RUN:-}" ] || trap terminated TERM
  read_settings
  divide_nodes
  make_log_folder
  set_environment
  read_config
  [ -n "${DRY_RUN:-}" ] || check_nodes
  start_rollouts
  start_trainer
  [ -n "${DRY_RUN:-}" ] || supervise
}

read_settings() {
  GPUS_PER_NODE=${GPUS_PER_NODE:-8}
  COLOCATED=${COLOCATED:-0}
  TRAIN_PER_NODE=${TRAIN_PER_NODE:-$((COLOCATED ? GPUS_PER_NODE / 2 : GPUS_PER_NODE))}
  LOG_ROOT=$(realpath -m "${LOG_ROOT:-$DYPO_HOME/runs/slurm}") # containers mount it by its full name
  GRACE_S=${GRACE_S:-270}
  MAX_RESTARTS=${MAX_RESTARTS:-3}
  SPARE_NODES=${SPARE_NODES:-0} SPARE=()
  ATTEMPT=${SLURM_RESTART_COUNT:-0}
  JOB=${SLURM_JOB_ID:-JOBID}
  [ -n "${SLURM_JOB_ID:-}${DRY_RUN:-}" ] || fail "not in a Slurm job: submit with sbatch, or set DRY_RUN=1 to see what it would run"
  # srun refuses more than one of these; --mem=0 of the scripts gives the last.
  [ -z "${SLURM_MEM_PER_CPU:-}${SLURM_MEM_PER_GPU:-}" ] || unset SLURM_MEM_PER_NODE
  [ "${SLURM_CPUS_ON_NODE:-$TRAIN_PER_NODE}" -ge "$TRAIN_PER_NODE" ] \
    || say "warning: $SLURM_CPUS_ON_NODE CPUs for $TRAIN_PER_NODE ranks on a node: slow; give sbatch --exclusive or --cpus-per-task"
  [ "$ATTEMPT" -le "${MAX_REQUEUES:-50}" ] || fail "requeued $ATTEMPT times, more than MAX_REQUEUES=${MAX_REQUEUES:-50}"
  cd "$DYPO_HOME" || exit
  [ -f "$CONFIG" ] || fail "CONFIG=$CONFIG: no such file in DYPO_HOME=$DYPO_HOME"
  CONTAINER=()
  if [ -n "${IMAGE:-}" ]; then
    # IMAGE is a file if it begins with a slash; anything else is a name in a registry.
    [[ $IMAGE != /* || -f $IMAGE || -n ${DRY_RUN:-} ]] || fail "IMAGE=$IMAGE: no such file"
    CONTAINER=(--container-image="$IMAGE" --container-mounts="$DYPO_HOME:$DYPO_HOME,$LOG_ROOT:$LOG_ROOT${MOUNTS:+,$MOUNTS}"
      --no-container-mount-home --container-workdir="$DYPO_HOME")
    PYTHON=python3
  elif [ -n "${VENV:-}" ]; then
    [ -x "$VENV/bin/python" ] || fail "VENV=$VENV: no bin/python in it"
    PYTHON=$VENV/bin/python
  else
    fail "set IMAGE (a container image with the program's requirements) or VENV (a Python environment that all nodes see)"
  fi
}

# NODES: all nodes; TRAIN: nodes that train; ROLLOUT: nodes that serve; SPARE: nodes that wait.
divide_nodes() {
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  else
    mapfile -t NODES < <(seq -f 'node%g' "${SLURM_NNODES:-$DEFAULT_NODES}")
  fi
  local count=$((${#NODES[@]} - SPARE_NODES))
  SPARE=("${NODES[@]:count > 0 ? count : 0}")
  if [ "$COLOCATED" = 1 ]; then
    [ "$SPARE_NODES" = 0 ] || fail "SPARE_NODES=$SPARE_NODES: COLOCATED=1 loses servers with a trainer node; needs 0"
    [ "$ROLLOUT_NODES" -le "$count" ] || fail "ROLLOUT_NODES=$ROLLOUT_NODES: the job has $count nodes"
    TRAIN=("${NODES[@]}")
    ROLLOUT=("${NODES[@]:0:ROLLOUT_NODES}")
  else
    [ "$ROLLOUT_NODES" -lt "$count" ] || fail "ROLLOUT_NODES=$ROLLOUT_NODES of ${#NODES[@]} nodes$([ "$SPARE_NODES" = 0 ] || echo " with SPARE_NODES=$SPARE_NODES") leaves none to train: give sbatch more --nodes"
    TRAIN=("${NODES[@]:0:count-ROLLOUT_NODES}")
    ROLLOUT=("${NODES[@]:count-ROLLOUT_NODES:ROLLOUT_NODES}")
  fi
  [ "${ROUTER:-0}:$ROLLOUT_NODES" != 1:0 ] || fail "ROUTER=1 needs ROLLOUT_NODES: servers of the run itself have none"
  OVERRIDES+=("parallel.num_processes=$((${#TRAIN[@]} * TRAIN_PER_NODE))")
  # Put this before the user's overrides: read_config then sees a different number of the user's.
  OVERRIDES=("rollout.servers.nodes=$(rollout_nodes)" "${OVERRIDES[@]}")
}

# Print the right value of rollout.servers.nodes: servers that the run starts itself are on one node.
rollout_nodes() { echo $((${#ROLLOUT[@]} > 0 ? ${#ROLLOUT[@]} : 1)); }

make_log_folder() {
  DYPO_LOGS=$LOG_ROOT/${SLURM_JOB_NAME:-dypo}/$JOB.$ATTEMPT
  [ -z "${DRY_RUN:-}" ] || return 0
  mkdir -p "$DYPO_LOGS"/{bad,well,ended,ends} || fail "LOG_ROOT=$LOG_ROOT: cannot make $DYPO_LOGS"
  ln -sfn "$JOB.$ATTEMPT" "$LOG_ROOT/${SLURM_JOB_NAME:-dypo}/latest"
  echo "$JOB" >"$DYPO_LOGS/canary"
  printf '%s trainer\n' "${TRAIN[@]}" >"$DYPO_LOGS/roles"
  [ "${#ROLLOUT[@]}" = 0 ] || printf '%s rollout\n' "${ROLLOUT[@]}" >>"$DYPO_LOGS/roles"
  [ "${#SPARE[@]}" = 0 ] || printf '%s spare\n' "${SPARE[@]}" >>"$DYPO_LOGS/roles"
  say "job $JOB, attempt $ATTEMPT: ${#TRAIN[@]} trainer and ${#ROLLOUT[@]} rollout nodes$([ "$SPARE_NODES" = 0 ] || echo ", $SPARE_NODES spare"); logs in $DYPO_LOGS"
}

set_environment() {
  # Ports of this attempt, below the ephemeral range. They differ from those of processes that an earlier attempt left.
  set_value DYPO_PORT $((10000 + (${SLURM_JOB_ID:-0} * 7 + ATTEMPT) % 250 * 80))
  set_value DYPO_TRAIN_NODES "${TRAIN[*]}"
  set_value DYPO_ROLLOUT_NODES "${ROLLOUT[*]}"
  export DYPO_SPARE_NODES="${SPARE[*]}"
  set_value DYPO_LOGS "$DYPO_LOGS"
  set_value GPUS_PER_NODE "$GPUS_PER_NODE"
  set_value DYPO_PYTHON "$PYTHON"
  set_default PREFLIGHT full # quick: ask only the driver
  set_value SLURM_EXPORT_ENV ALL # job steps see this environment even if sbatch was told --export=NONE
  set_default PYTHONUNBUFFERED 1
  set_default OMP_NUM_THREADS 1
  set_default HF_HOME "$LOG_ROOT/hf_home"
  set_default HF_HUB_OFFLINE 1
  set_default CUDA_DEVICE_MAX_CONNECTIONS 1 # for TP and CP, before Blackwell; SGLang sets its own
  # SGLang turns both off in its processes. The two ends of a NCCL group that carries weights must agree.
  set_default NCCL_CUMEM_ENABLE 0
  set_default NCCL_NVLS_ENABLE 0
  set_default NVSHMEM_DISABLE_NCCL 1
  export PYTHONPATH=$DYPO_HOME${PYTHONPATH:+:$PYTHONPATH} no_proxy
  no_proxy=${no_proxy:+$no_proxy,}127.0.0.1,localhost,$(join , "${NODES[@]}")${NODE_DOMAIN:+,.$NODE_DOMAIN}
  export NODE_DOMAIN=${NODE_DOMAIN:-}
  # NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_IB_HCA, if the cluster needs them, come from sbatch's environment.
  [ -z "${DRY_RUN:-}" ] || return 0
  raise_limit -n 65536
  raise_limit -l unlimited # pinned memory and RDMA
  # The keys are in the environment only: job steps inherit them, and no command line and no file of the job shows them.
  DYPO_SGLANG_API_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  MEGATRON_DYPO_STORE_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # of the store on which trainer nodes meet
  export DYPO_SGLANG_API_KEY MEGATRON_DYPO_STORE_KEY
}

# raise_limit OPTION VALUE: raise a soft limit to the value, or to the hard limit; never lower it.
raise_limit() {
  local now
  now=$(ulimit -S "$1")
  [ "$now" != unlimited ] || return 0
  [ "$2" = unlimited ] || [ "$now" -lt "$2" ] || return 0
  ulimit -S "$1" "$2" 2>/dev/null || ulimit -S "$1" "$(ulimit -H "$1")"
}

set_value() {
  export "$1=$2"
  [ -z "${DRY_RUN:-}" ] || printf 'export %s=%q\n' "$1" "$2"
}

# Print the name by which other nodes reach a node.
address() { echo "$1${NODE_DOMAIN:+.$NODE_DOMAIN}"; }

# set_default NAME VALUE: as set_value, unless the environment of sbatch has a value.
set_default() { set_value "$1" "${!1:-$2}"; }

# Resolve the config before anything starts, and take the sizes of the servers from it.
read_config() {
  local resolved errors in_container=()
  errors=$(mktemp)
  [ "${#CONTAINER[@]}" = 0 ] || in_container=(srun --overlap --nodes=1 --ntasks=1 "--nodelist=${NODES[0]}" "${CONTAINER[@]}")
  local check=("${in_container[@]}" "$PYTHON" -m megatron_dypo.cli train "$CONFIG" "${OVERRIDES[@]}" --dry-run --strict)
  [ -z "${DRY_RUN:-}" ] || check=("${VENV:+$VENV/bin/}python3" -m megatron_dypo.cli train "$CONFIG" "${OVERRIDES[@]}" --dry-run)
  resolved=$("${check[@]}" 2>"$errors") || fail "$(one_line <"$errors")$(explain_missing_module <"$errors")"
  [ ! -d "$DYPO_LOGS" ] || echo "$resolved" >"$DYPO_LOGS/config.yaml"
  rm "$errors"
  RUN_DIR=$(run_field dir <<<"$resolved")
  [ ! -d "$DYPO_LOGS" ] || [ "$(run_field shared_files <<<"$resolved")" = true ] || chmod 700 "$DYPO_LOGS"
  SERVERS_PER_NODE=$(field per_node <<<"$resolved")
  local tensor_parallel nodes
  nodes=$(field nodes <<<"$resolved")
  [ "$nodes" = "$(rollout_nodes)" ] \
    || fail "rollout.servers.nodes=$nodes, but the job has ROLLOUT_NODES=${#ROLLOUT[@]}: leave the override out, or set ROLLOUT_NODES"
  tensor_parallel=$(field tensor_parallel <<<"$resolved")
  NODES_PER_SERVER=$(((tensor_parallel + GPUS_PER_NODE - 1) / GPUS_PER_NODE))
  export SERVERS_PER_NODE NODES_PER_SERVER
  local used=$((SERVERS_PER_NODE * tensor_parallel)) needed="rollout.servers.per_node=$SERVERS_PER_NODE × rollout.servers.tensor_parallel=$tensor_parallel"
  if [ "${#ROLLOUT[@]}" -gt 0 ] && [ "$NODES_PER_SERVER" -gt 1 ]; then
    [ "$SERVERS_PER_NODE:$((${#ROLLOUT[@]} % NODES_PER_SERVER))" = 1:0 ] \
      || fail "$needed: a server takes $NODES_PER_SERVER nodes of $GPUS_PER_NODE GPUs; needs per_node=1 and a multiple of that for ROLLOUT_NODES=${#ROLLOUT[@]}"
  elif [ "${#ROLLOUT[@]}" -gt 0 ]; then
    [ $((used + COLOCATED * TRAIN_PER_NODE)) -le "$GPUS_PER_NODE" ] \
      || fail "$needed: more than the GPUs of a node, GPUS_PER_NODE=$GPUS_PER_NODE$([ "$COLOCATED" = 0 ] || echo ", less TRAIN_PER_NODE=$TRAIN_PER_NODE")"
  fi
}

# Print the value of a key of the section run in a resolved config.
run_field() { awk -v key="$1:" '/^run:/ { inside = 1 } inside && $1 == key { sub(/^ *[a-z_]*: */, ""); print; exit }'; }

# Print the value of a key of rollout.servers in a resolved config.
field() { awk -v key="$1:" '/^  servers:/ { inside = 1 } inside && $1 == key { print $2; exit }'; }

# Print the error that megatron-dypo reports, or the last line of a traceback.
one_line() {
  awk '/^megatron-dypo: error: / { sub(/^megatron-dypo: error: /, ""); text = $0; ours = 1; next }
       ours { text = text "; " $0; next } { text = $0 } END { print text }'
}

# Say what a dry run needs, if the host's Python lacks the program's packages, as that of a login node does.
explain_missing_module() {
  [ -z "${DRY_RUN:-}" ] || ! grep -q 'No module named' \
    || echo ': DRY_RUN=1 reads the config with the Python of this host: set VENV beside IMAGE, or run it in the image'
}

join() {
  local IFS=$1
  echo "${*:2}"
}

# step ROLE NODE... -- COMMAND...: run on each of these nodes, with a log for each.
step() {
  local role=$1 kill=1 nodes=() where
  shift
  while [ "$1" != -- ]; do
    nodes+=("$1")
    shift
  done
  shift
  # When the servers of one node have ended, those of other nodes go on: the trainer can finish its step and save.
  [ "$role" != rollout ] || kill=0
  where=(--nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --nodelist="$(join , "${nodes[@]}")")
  local command=(srun --overlap --kill-on-bad-exit="$kill" --cpu-bind=none "${where[@]}" --chdir="$DYPO_HOME"
    --open-mode=append --output="$DYPO_LOGS/$role.%N.log" "$@")
  if [ -n "${DRY_RUN:-}" ]; then
    printf '\n%s' "${command[0]}"
    printf ' \\\n  %q' "${command[@]:1}"
    echo
  else
    exec "${command[@]}"
  fi
}

start() {
  if [ -n "${DRY_RUN:-}" ]; then
    step "$@"
  else
    step "$@" &
    PID[$1]=$!
  fi
}

# Print one URL a line. A server that spans several nodes answers on the first of them.
server_urls() {
  local index server
  for index in "${!ROLLOUT[@]}"; do
    [ $((index % NODES_PER_SERVER)) = 0 ] || continue
    for ((server = 0; server < SERVERS_PER_NODE; server++)); do
      echo "http://$(address "${ROLLOUT[index]}"):$((DYPO_PORT + 20 + index * SERVERS_PER_NODE + server))"
    done
  done
}

start_rollouts() {
  [ "${#ROLLOUT[@]}" -gt 0 ] || return 0
  local gpus=() urls
  [ "$COLOCATED" = 0 ] || gpus=("rollout.servers.base_gpu=$TRAIN_PER_NODE")
  start rollout "${ROLLOUT[@]}" -- "${CONTAINER[@]}" bash slurm/node.sh rollout "$PYTHON" -m megatron_dypo.cli serve "$CONFIG" \
    "${OVERRIDES[@]}" "${gpus[@]}" "rollout.servers.urls=[]" "rollout.servers.router=null"
  mapfile -t urls < <(server_urls)
  OVERRIDES+=("rollout.servers.urls=[$(join , "${urls[@]}")]" "rollout.servers.urls_are_restarted=true")
  [ "${ROUTER:-0}" = 1 ] || return 0
  OVERRIDES+=("rollout.servers.router=http://$(address "${ROLLOUT[0]}"):$((DYPO_PORT + 1))")
  start router "${ROLLOUT[0]}" -- "${CONTAINER[@]}" bash slurm/node.sh router "$PYTHON" -m megatron_dypo.cli route "$CONFIG" \
    "${OVERRIDES[@]}"
}

start_trainer() {
  # Another port for each start: the last one may still be in use. The number also tells the run's lock who came first.
  export DYPO_TRAINER_START=$TRAINER_STARTS
  local port=$((DYPO_PORT + TRAINER_STARTS % 16 + (TRAINER_STARTS % 16 > 0 ? 3 : 0)))
  count_start
  start trainer "${TRAIN[@]}" -- "${CONTAINER[@]}" bash slurm/node.sh trainer "$PYTHON" -m megatron_dypo.launch.torchrun \
    --nnodes="${#TRAIN[@]}" --nproc-per-node="$TRAIN_PER_NODE" --master-addr="$(address "${TRAIN[0]}")" --master-port="$port" \
    --max-restarts=0 -m megatron_dypo.cli train "$CONFIG" "${OVERRIDES[@]}"
}
