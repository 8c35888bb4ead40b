#!/usr/bin/env bash
# A real Slurm on this host: one_host_slurm.sh up | down. Needs Debian's slurm-wlm and munge, and root.
# Virtual nodes node1, node2, ... have host names and spool folders of their own; they share 127.0.0.1 and its ports.
#   FS_ROOT   folder of configuration, state and logs, the same for up and down
#   FS_PORT   first of about 1,000 ports
#   FS_NODES  number of nodes, 4
#   FS_SPANK  a SPANK plugin to load
#   FS_APART  1: nodes share nothing but the file system. node1 has a network namespace with the addresses 10.78.0.1 and
#             fd78::1, and its own /etc/hosts (the file FS_ROOT/hosts.node1), /dev/shm and local disk (FS_ROOT/local, to
#             which SLURM_TMPDIR leads). A switch, a namespace of no node, connects them; slurmctld is there, at
#             10.78.0.254, and so must be whoever submits a job. The host's own network and /etc/hosts stay as they are.
set -euo pipefail
ROOT=${FS_ROOT:?a folder} NODES=${FS_NODES:-4} PORT=${FS_PORT:?a port} GPUS=8 APART=${FS_APART:-}
export SLURM_CONF=$ROOT/slurm.conf

write_config() {
  # FirstJobId: ports of jobs follow from their numbers, and another Slurm may run on this host.
  # ReturnToService=0: a node that a test sets down stays so, although its daemon is well.
  cat >"$ROOT/slurm.conf" <<CONF
ClusterName=onehost
FirstJobId=$((RANDOM % 30000 + 1))
SlurmctldHost=localhost($([ -n "$APART" ] && echo 10.78.0.254 || echo 127.0.0.1))
SlurmctldPort=$((PORT + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/sock
$([ -n "$APART" ] && echo "TaskProlog=$ROOT/task_prolog" || echo CommunicationParameters=NoInAddrAny,NoCtldInAddrAny)
SrunPortRange=$((PORT + 100))-$((PORT + 900))
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool.%n
TmpFS=$ROOT/$([ -n "$APART" ] && echo local || echo tmp.%n)
SlurmctldPidFile=$ROOT/pid/slurmctld.pid
SlurmdPidFile=$ROOT/pid/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
PlugStackConfig=$ROOT/plugstack.conf
KillWait=10
ReturnToService=0
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
NodeName=node[1-$NODES] NodeAddr=$([ -n "$APART" ] && echo "10.78.0.[1-$NODES]" || echo 127.0.0.1) Port=$((PORT + 11))-$((PORT + 10 + NODES)) CPUs=16 RealMemory=1000000 Gres=gpu:h100:$GPUS State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=7-0 State=UP PreemptMode=OFF
PartitionName=scavenge Nodes=ALL MaxTime=7-0 State=UP GraceTime=240
PartitionName=urgent Nodes=ALL MaxTime=7-0 State=UP PriorityTier=10
CONF
  echo "${FS_SPANK:+required $FS_SPANK}" >"$ROOT/plugstack.conf"
  echo "Name=gpu Type=h100 Flags=nvidia_gpu_env File=$ROOT/dev/nvidia[0-$((GPUS - 1))]" >"$ROOT/gres.conf"
}

up() {
  mkdir -p "$ROOT"/{pid,log,state,munge,dev}
  chmod 755 "$ROOT" "$ROOT/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$ROOT/munge/key")
  write_config
  local index node
  # Device nodes: Slurm gives no CUDA_VISIBLE_DEVICES for plain files. These are clones of /dev/null.
  for index in $(seq 0 $((GPUS - 1))); do mknod "$ROOT/dev/nvidia$index" c 1 3; done
  [ -z "$APART" ] || make_switch
  munged --key-file="$ROOT/munge/key" --socket="$ROOT/munge/sock" --pid-file="$ROOT/pid/munged.pid" \
    --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munge/seed" --num-threads=1
  in_switch slurmctld -i
  for index in $(seq "$NODES"); do
    node=node$index
    mkdir -p "$ROOT/spool.$node"
    if [ -n "$APART" ]; then
      unshare --uts --net --mount "$0" node "$index"
    else
      grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
      mkdir -p "$ROOT/tmp.$node"
      unshare --uts sh -c "hostname $node && exec slurmd -N $node"
    fi
  done
  for _ in $(seq 120); do
    [ "$(in_switch sinfo --noheader --Node --states idle --partition batch | wc -l)" != "$NODES" ] || return 0
    sleep 0.25
  done
  echo "one_host_slurm.sh: not all nodes are idle" >&2
  in_switch sinfo >&2
  return 1
}

# Run a command where slurmctld is.
in_switch() {
  local enter=()
  [ -z "$APART" ] || enter=(nsenter --target "$(cat "$ROOT/pid/switch.pid")" --net --mount)
  "${enter[@]}" "$@"
}

make_switch() {
  local index
  { echo 127.0.0.1 localhost; for index in $(seq "$NODES"); do echo "10.78.0.$index node$index"; done; } >"$ROOT/hosts.switch"
  for index in $(seq "$NODES"); do cp "$ROOT/hosts.switch" "$ROOT/hosts.node$index"; done
  mkdir "$ROOT/local"
  printf '#!/bin/sh\necho export SLURM_TMPDIR=%s\n' "$ROOT/local" >"$ROOT/task_prolog"
  chmod 755 "$ROOT/task_prolog"
  unshare --net --mount "$0" switch >"$ROOT/log/switch.log" 2>&1 </dev/null &
  echo $! >"$ROOT/pid/switch.pid"
  for _ in $(seq 100); do
    [ ! -e "$ROOT/namespaces" ] || return 0
    sleep 0.1
  done
  echo "one_host_slurm.sh: no switch: $(cat "$ROOT/log/switch.log")" >&2
  return 1
}

# Be the switch, in namespaces of its own.
switch() {
  ip link set lo up
  ip link add switch type "bridge"
  ip addr add 10.78.0.254/24 dev switch
  ip addr add fd78::fe/64 dev switch nodad
  ip link set switch up
  mount --bind "$ROOT/hosts.switch" /etc/hosts
  readlink /proc/$$/ns/net >>"$ROOT/namespaces"
  exec sleep infinity
}

# node INDEX: be a node, in namespaces of its own.
node() {
  local name=node$1 switch
  switch=$(cat "$ROOT/pid/switch.pid")
  readlink /proc/$$/ns/net >>"$ROOT/namespaces"
  hostname "$name"
  ip link set lo up
  ip link add eth0 type veth peer name "$name" netns "$switch"
  ip addr add "10.78.0.$1/24" dev eth0
  ip addr add "fd78::$1/64" dev eth0 nodad
  ip link set eth0 up
  nsenter --target "$switch" --net ip link set "$name" master switch up
  mount --bind "$ROOT/hosts.$name" /etc/hosts
  mount -t tmpfs -o mode=1777 "$name" /dev/shm
  mount -t tmpfs -o mode=1777 "$name" "$ROOT/local"
  exec slurmd -N "$name"
}

down() {
  local file signal
  for file in "$ROOT"/pid/slurm*.pid "$ROOT"/pid/munged.pid; do
    [ ! -s "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
  done
  # A namespace, its interfaces and its mounts go with its last process.
  for signal in TERM KILL; do
    members | xargs --no-run-if-empty kill "-$signal" 2>/dev/null || true
    for _ in $(seq 50); do
      [ -n "$(members)" ] || return 0
      sleep 0.1
    done
  done
  echo "one_host_slurm.sh: processes that do not end: $(members | xargs)" >&2
  return 1
}

# Print the processes of all namespaces of this Slurm.
members() {
  [ -s "$ROOT/namespaces" ] || return 0
  find /proc/[0-9]*/ns/net -maxdepth 0 -printf '%p %l\n' 2>/dev/null | grep -F -f "$ROOT/namespaces" | cut -d / -f 3 || true
}

"$@"
