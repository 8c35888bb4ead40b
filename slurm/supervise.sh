# shellcheck shell=bash
# Watch a job after its roles have started: decide when it ends and saves. Sourced by common.sh.

# shellcheck source=slurm/requeue.sh
source "$DYPO_HOME/slurm/requeue.sh"

STOP_AT='' # value of SECONDS at which the time of a trainer that was asked to stop is over
OVERRAN=''  # set if that time was too short
WANTS_STOP=''
trap 'WANTS_STOP="the time limit is near, or the job is preempted"' USR1 # set early: without a trap the signal kills bash

# SIGTERM comes when Slurm ends the job (scancel, the time limit). If the site gives a grace time, it also comes before a
# preemption: then the job is still running. Where Slurm is too busy to say so, it is taken to be.
terminated() {
  case $(job_state) in
    RUNNING | '') ;;
    *) exit 143 ;;
  esac
  WANTS_STOP='the time limit is near, or the job is preempted'
}

TRAINER_STARTS=0      # how often this attempt has started its trainer
STARTS_AT_CHECKPOINT=0 # … since the run's last checkpoint changed
LAST_CHECKPOINT=''
FIRST_CHECKPOINT='' # the run's last checkpoint when this attempt began
FAILED_NODE=''      # rollout node that failed
FAILURE_MAY_PASS='' # set if the servers that failed were lost, and did not refuse their input

# Print the job's state; of a heterogeneous job, that of its first component. Print nothing if Slurm does not answer.
job_state() { squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null | sed -n 1p || true; }

# Every node checks itself first. If some are bad, the job goes back to the queue, to run on other nodes.
check_nodes() {
  start preflight "${NODES[@]}" -- "${CONTAINER[@]}" bash slurm/node.sh preflight
  local status=0
  wait "${PID[preflight]}" || status=$? # a trap ends it too
  [ "$status" != 143 ] || WANTS_STOP=${WANTS_STOP:-'the preflight was told to end'}
  [ -z "$WANTS_STOP" ] || stop_before_start
  unset 'PID[preflight]'
  [ "$status" = 0 ] || fail "preflight: a node did not answer; see $DYPO_LOGS/preflight.*.log"
  # srun also ends with 0 if a node could not start the step because it lacks the folder for its output.
  local bad missing deadline=$((SECONDS + ${MARKS_S:-60})) # a file server may show new files late
  mapfile -t missing < <(unmarked_nodes)
  while [ "${#missing[@]}" -gt 0 ] && [ "$SECONDS" -lt "$deadline" ]; do
    sleep 1
    mapfile -t missing < <(unmarked_nodes)
  done
  [ "${#missing[@]}" = 0 ] || fail "preflight: nothing was heard of $(join , "${missing[@]}") in $DYPO_LOGS: LOG_ROOT must be on a file system that all nodes share"
  mapfile -t bad < <(ls "$DYPO_LOGS/bad")
  [ "${#bad[@]}" -gt 0 ] || return 0
  local node
  for node in "${bad[@]}"; do
    say "bad node $node: $(cat "$DYPO_LOGS/bad/$node")"
    note_bad_node "$node" "$(cat "$DYPO_LOGS/bad/$node")"
  done
  [ "${#bad[@]}" -lt "${#NODES[@]}" ] || fail "preflight: all nodes are bad; ${bad[0]}: $(cat "$DYPO_LOGS/bad/${bad[0]}")"
  requeue "without $(join , "${bad[@]}")" "${bad[@]}"
}

# End a job that was asked to stop before its roles had started.
stop_before_start() {
  say "$WANTS_STOP: nothing has started yet"
  echo "75 0 stopped: before the start" >"$DYPO_LOGS/ends/${TRAIN[0]}"
  conclude
}

# Print the nodes that have said neither that they are well nor that they are bad.
unmarked_nodes() {
  local node
  for node in "${NODES[@]}"; do
    [ -f "$DYPO_LOGS/well/$node" ] || [ -f "$DYPO_LOGS/bad/$node" ] || echo "$node"
  done
}

supervise() {
  trap stop_roles EXIT
  local role
  # The trainer comes last: if servers have ended as well, that is why it did.
  while true; do
    [ -z "$WANTS_STOP" ] || ask_trainer_to_stop "$WANTS_STOP"
    sleep 1 &
    wait $! || true
    notice_ended_servers
    for role in router rollout trainer; do
      [ -z "${PID[$role]:-}" ] || kill -0 "${PID[$role]}" 2>/dev/null || role_ended "$role"
    done
    if [ -n "$STOP_AT" ] && [ $((SECONDS % 20)) = 0 ]; then
      kill -USR1 "${PID[trainer]}" || true # sent again for a rank that had not yet started the first time
    fi
    if [ -n "$STOP_AT" ] && [ "$SECONDS" -ge "$STOP_AT" ]; then
      say "the trainer did not stop within GRACE_S=$GRACE_S; its last checkpoint counts"
      OVERRAN=1
      conclude
    fi
  done
}

ask_trainer_to_stop() {
  [ -z "$STOP_AT" ] || return 0
  say "$1: the trainer finishes its step and saves"
  STOP_AT=$((SECONDS + GRACE_S))
  kill -USR1 "${PID[trainer]}" || true # the trainer may have just ended
}

# Notice that the servers of a node have ended for good; those of other nodes may go on. Status 0 is no failure: Slurm
# told them to end by a SIGTERM to all steps. Nor is any status while the trainer is stopping.
notice_ended_servers() {
  local node status
  node=$(find "$DYPO_LOGS/ended" -type f -size +0 -printf '%f\n' -quit) # an empty one is being written
  [ -n "$node" ] && [ -z "${FAILURE:-}$STOP_AT$WANTS_STOP" ] || return 0
  status=$(cat "$DYPO_LOGS/ended/$node")
  if [ "$status" = 0 ]; then
    WANTS_STOP="rollout on $node was told to end"
  else
    FAILED_NODE=$node
    servers_failed "$status" "rollout on $node ended with status $status; see $DYPO_LOGS/rollout.$node.log$(quote_error "rollout.$node")"
  fi
}

# servers_failed STATUS WORDS: have the trainer stop. Servers or a router that end so were lost, unless they refused their
# input or have a bug (docs/exit_statuses.md).
servers_failed() {
  FAILURE=$2
  case $1 in
    2 | 65 | 70) ;;
    *) FAILURE_MAY_PASS=1 ;;
  esac
  ask_trainer_to_stop "$FAILURE"
}

role_ended() {
  local role=$1 status=0
  wait "${PID[$role]}" || status=$?
  unset "PID[$role]"
  if [ "$role" != trainer ]; then
    notice_ended_servers # its message says more
    [ -z "${FAILURE:-}$STOP_AT$WANTS_STOP" ] || return 0
    if [ "$status" = 0 ]; then
      WANTS_STOP="$role was told to end"
      return
    fi
    servers_failed "$status" "$role ended with status $status; see $DYPO_LOGS/$role.*.log$(quote_error "$role.*")"
  elif [ -f "$DYPO_LOGS/stopped" ] && { [ "$status" = 0 ] || [ -n "$STOP_AT$WANTS_STOP" ]; }; then
    conclude # with another status, srun told a node to stop because another one had failed
  elif [ "$status" != 0 ]; then
    local end
    end=$(trainer_end "$status")
    if [ -n "${FAILURE:-}" ]; then
      was_lost "$status" 0 || fail "$FAILURE; $end"
      end_without_servers "$FAILURE; $end"
    fi
    restart_trainer "$status" "$end"
  else
    stop_roles
    say "done; logs in $DYPO_LOGS"
    exit 0
  fi
}

# restart_trainer STATUS END: start a trainer that was lost again, beside the servers, which go on. Spare nodes replace lost
# ones. The job fails instead if the end is not of that kind, or if the run got no further in MAX_RESTARTS starts.
restart_trainer() {
  local status=$1 end=$2 node lost=() spare=() train=()
  mapfile -t lost < <(lost_nodes "${TRAIN[@]}")
  was_lost "$status" "${#lost[@]}" || fail "$end"
  if [ -n "$STOP_AT$WANTS_STOP" ]; then # it was lost while it saved
    say "$end"
    conclude
  fi
  mapfile -t spare < <(well_nodes "${SPARE[@]}")
  if [ "${#lost[@]}" -gt "${#spare[@]}" ]; then
    say "$end"
    requeue "without $(join , "${lost[@]}")" "${lost[@]}"
  fi
  ! got_further "$LAST_CHECKPOINT" || STARTS_AT_CHECKPOINT=0
  [ "$STARTS_AT_CHECKPOINT" -le "$MAX_RESTARTS" ] \
    || fail "$end; started $STARTS_AT_CHECKPOINT times since the run's last checkpoint, more than 1 + MAX_RESTARTS=$MAX_RESTARTS"
  for node in "${TRAIN[@]}"; do
    if [[ " ${lost[*]} " = *" $node "* ]]; then
      say "$node is lost; ${spare[0]} trains in its place"
      node=${spare[0]}
      spare=("${spare[@]:1}")
    fi
    train+=("$node")
  done
  TRAIN=("${train[@]}") SPARE=("${spare[@]}")
  say "$end"
  say "the trainer starts again in place"
  mv "$DYPO_LOGS/ends" "$DYPO_LOGS/ends.$TRAINER_STARTS"
  mkdir "$DYPO_LOGS/ends"
  rm -f "$DYPO_LOGS/stopped" # of a node that srun told to end because another one had
  export DYPO_TRAIN_NODES="${TRAIN[*]}"
  start_trainer
}

# Count a start of the trainer.
count_start() {
  TRAINER_STARTS=$((TRAINER_STARTS + 1)) STARTS_AT_CHECKPOINT=$((STARTS_AT_CHECKPOINT + 1))
  LAST_CHECKPOINT=$(last_checkpoint)
  [ "$TRAINER_STARTS" -gt 1 ] || FIRST_CHECKPOINT=$LAST_CHECKPOINT
}

# got_further STEP: tell whether the run has a later checkpoint than that of STEP, which may be empty.
got_further() {
  local now
  now=$(last_checkpoint)
  [[ $now =~ ^[0-9]+$ ]] && { [[ ! $1 =~ ^[0-9]+$ ]] || [ "$((10#$now))" -gt "$((10#$1))" ]; }
}

# Print the step of the run's last checkpoint.
last_checkpoint() { cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || true; }

# was_lost STATUS NUM_LOST_NODES: tell whether the trainer ended because a node failed (72), a rank hung (76) or was lost (77),
# or with its node or launcher, which then says nothing. After any other end a new start would end alike; docs/exit_statuses.md.
was_lost() {
  local said number=0
  while read -r said _; do
    number=$((number + 1))
    case $said in
      0 | 72 | 75 | 76 | 77 | 143) ;;
      69) [ -n "${FAILURE:-}" ] || return 1 ;; # its servers were lost, which is told already
      *) return 1 ;;
    esac
  done < <(cat "$DYPO_LOGS/ends"/* 2>/dev/null)
  [ "$number" -gt 0 ] || [ "$2" -gt 0 ] || [ "$1" -gt 128 ]
}

# Print those of the given nodes that Slurm has lost, by their short state.
lost_nodes() {
  local node state
  [ $# -gt 0 ] || return 0
  sinfo --noheader --Node --nodes="$(join , "$@")" --format='%N %t' | sort -u \
    | while read -r node state; do [[ ! $state =~ \*|^(down|fail|drain|drng|error|unk|reboot) ]] || echo "$node"; done
}

# Print the other ones.
well_nodes() { comm -23 <(printf '%s\n' "$@" | sort) <(lost_nodes "$@" | sort) | grep . || true; }

# End all roles: Slurm tells their processes to end, and srun kills those that do not. (An srun that is told to end kills
# its processes at once, and says so as if it were an error.)
stop_roles() {
  local pid
  [ "${#PID[@]}" = 0 ] || scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true
  await_roles 25
  for pid in "${PID[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  await_roles 35
  for pid in "${PID[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  PID=()
}

# await_roles SECONDS: wait until all roles have ended, or the time is over.
await_roles() {
  local pid deadline=$((SECONDS + $1))
  for pid in "${PID[@]}"; do
    while kill -0 "$pid" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
  done
}

# Print why the trainer ended, on which node that began, and which log says more. A node that only lost the others (77,
# rank_lost) counts only if no other node gives a reason.
trainer_end() {
  local file first='' node said='' status=$1 # srun's: that of the node that ended last, or worst
  while read -r file; do
    first=${first:-$file}
    case $(cut -d ' ' -f 1 "$DYPO_LOGS/ends/$file") in
      0 | 75 | 77 | 143) ;;
      *) first=$file && break ;;
    esac
  done < <(find "$DYPO_LOGS/ends" -type f -printf '%T@ %f\n' | sort -n | cut -d ' ' -f 2)
  node=${first:-'*'}
  [ -z "$first" ] || read -r status _ said <"$DYPO_LOGS/ends/$first" || true
  said=${said:+: $said}
  echo "trainer${first:+ on $node} ended with status $status; see $DYPO_LOGS/trainer.$node.log${said:-$(quote_error "trainer.$node")}"
}

# Print the first line of a role's log that looks like a reason; the log's name is given without its ending. A line that
# quotes another log is completed by the last line of the quotation that names an error.
quote_error() {
  # shellcheck disable=SC2086 # the name may be a pattern
  cat "$DYPO_LOGS"/$1.log 2>/dev/null | sed -E 's/^\[rank[0-9]+\]: //' | awk '
    reason == "" && /^([A-Za-z_.]*(Error|Exception): |megatron-dypo: error: )/ && !/ChildFailedError|SignalException/ { reason = $0; next }
    reason ~ /:$/ && NF { last = $0 }
    reason ~ /:$/ && /[Ee]rror/ { error = $0 }
    END { if (reason != "") print ": " reason (reason ~ /:$/ ? " " (error == "" ? last : error) : "") }' || true
}
