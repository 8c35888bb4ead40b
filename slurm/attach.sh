#!/usr/bin/env bash
# Look into a running job: attach.sh JOB lists its nodes and roles, attach.sh JOB NODE opens a shell on a node,
# attach.sh JOB NODE COMMAND... runs a command there. In a plain shell on the host, beside the job's containers.
set -euo pipefail

JOB=${1:?usage: attach.sh JOB [NODE [COMMAND...]]}
STATE=$(squeue --noheader --jobs "$JOB" --format %T 2>/dev/null) || STATE=
[ "$STATE" = RUNNING ] || {
  echo "attach.sh: job $JOB is ${STATE:-not in the queue}; only a running one has nodes" >&2
  exit 1
}
if [ $# = 1 ]; then
  # The job's output names the folder of each attempt.
  OUTPUT=$(scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p')
  LOGS=$(sed -n 's/^dypo: job .*; logs in //p' "$OUTPUT" | tail -n 1)
  cat "${LOGS:?attach.sh: $OUTPUT names no folder of logs}/roles"
  exit
fi
COMMAND=("${@:3}")
TERMINAL=()
[ $# -gt 2 ] || {
  COMMAND=(bash --login)
  TERMINAL=(--pty)
}
exec srun --jobid "$JOB" --overlap --nodes=1 --ntasks=1 --nodelist="$2" --cpu-bind=none "${TERMINAL[@]}" "${COMMAND[@]}"
