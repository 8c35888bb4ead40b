#!/usr/bin/env bash
# A real Slurm on this host: one_host_slurm.sh up | down. Needs Debian's slurm-wlm and munge, and root.
# Virtual nodes node1, node2, ... have host names and spool folders of their own; they share 127.0.0.1 and its ports.
#   FS_ROOT   folder of configuration, state and logs, the same for up and down
#   FS_PORT   first of about 1,000 ports
#   FS_NODES  number of nodes, 4
#   FS_SPANK  a SPANK plugin to load
set -euo pipefail
ROOT=${FS_ROOT:?a folder} NODES=${FS_NODES:-4} PORT=${FS_PORT:?a port} GPUS=8
export SLURM_CONF=$ROOT/slurm.conf

write_config() {
  # FirstJobId: ports of jobs follow from their numbers, and another Slurm may run on this host.
  # ReturnToService=0: a node that a test sets down stays so, although its daemon is well.
  cat >"$ROOT/slurm.conf" <<CONF
ClusterName=onehost
FirstJobId=$((RANDOM % 30000 + 1))
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$((PORT + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SrunPortRange=$((PORT + 100))-$((PORT + 900))
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool.%n
TmpFS=$ROOT/tmp.%n
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
NodeName=node[1-$NODES] NodeAddr=127.0.0.1 Port=$((PORT + 11))-$((PORT + 10 + NODES)) CPUs=16 RealMemory=1000000 Gres=gpu:h100:$GPUS State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=7-0 State=UP
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
  munged --key-file="$ROOT/munge/key" --socket="$ROOT/munge/sock" --pid-file="$ROOT/pid/munged.pid" \
    --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munge/seed" --num-threads=1
  slurmctld -i
  for index in $(seq "$NODES"); do
    node=node$index
    grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
    mkdir -p "$ROOT/spool.$node" "$ROOT/tmp.$node"
    unshare --uts sh -c "hostname $node && exec slurmd -N $node"
  done
  for _ in $(seq 120); do
    [ "$(sinfo --noheader --Node --states idle | wc -l)" != "$NODES" ] || return 0
    sleep 0.25
  done
  echo "one_host_slurm.sh: not all nodes are idle" >&2
  sinfo >&2
  return 1
}

down() {
  local file
  for file in "$ROOT"/pid/slurm*.pid "$ROOT"/pid/munged.pid; do
    [ ! -s "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
  done
}

"$1"
