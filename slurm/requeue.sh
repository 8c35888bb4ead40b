# shellcheck shell=bash
# End an attempt whose run goes on, and queue the next one, unless it would get no further. Sourced by supervise.sh.

MAX_STUCK=3 # attempts in a row at one checkpoint

# end_without_servers WORDS: servers have failed, and the trainer has ended. If servers were lost and this attempt got further,
# the job is requeued; without the node if the attempt before lost its servers on the same one. Else the next attempt would
# fail alike.
end_without_servers() {
  [ -n "$FAILURE_MAY_PASS" ] || fail "$1; submit again to resume"
  got_further "$FIRST_CHECKPOINT" || fail "$1; submit again to resume"
  say "$1"
  stop_roles
  echo "$FAILED_NODE" >"$DYPO_LOGS/lost_servers"
  if [ -n "$FAILED_NODE" ] && [ "$(cat "$(attempt_before)/lost_servers" 2>/dev/null)" = "$FAILED_NODE" ]; then
    note_bad_node "$FAILED_NODE" "its servers were lost in two attempts in a row"
    requeue "without $FAILED_NODE" "$FAILED_NODE"
  fi
  requeue "to go on from the last checkpoint"
}

# Print the log folder of the attempt before this one.
attempt_before() { echo "$LOG_ROOT/${SLURM_JOB_NAME:-dypo}/$JOB.$((ATTEMPT - 1))"; }

# note_bad_node NODE WORDS: add a line to the list of bad nodes.
note_bad_node() { echo "$(date -u +%FT%TZ) $JOB.$ATTEMPT $1 $2" >>"$LOG_ROOT/bad_nodes.txt"; }

# The trainer has stopped on request, or its time is over: requeue the job, unless servers failed in a way that stays.
conclude() {
  [ -z "${FAILURE:-}" ] || end_without_servers "$FAILURE"
  if made_no_step "$DYPO_LOGS" && made_no_step "$(attempt_before)"; then
    fail "two attempts in a row ended before they made a step, this one after $SECONDS s: the job needs a longer --time"
  fi
  stop_roles
  requeue "to go on from the last checkpoint"
}

# requeue REASON [NODE...]: queue the next attempt of this job, without those nodes.
requeue() {
  [ "$(job_state)" != COMPLETING ] || fail "the job was cancelled; submit again to resume"
  require_progress
  trap '' TERM USR1 # Slurm ends this attempt as soon as it gets the request
  say "attempt $ATTEMPT is requeued $1"
  scontrol requeue "$SLURM_JOB_ID" || fail "scontrol requeue $SLURM_JOB_ID failed; submit again to resume"
  if [ $# -gt 1 ]; then
    local excluded
    excluded=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p;s/^ *ExcNodeList=\([^ ]*\).*/\1/p' | grep -v null || true)
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(join , ${excluded:+"$excluded"} "${@:2}")" \
      || say "could not exclude ${*:2}: the next attempt may get them again"
  fi
  exit 0
}

# Tell whether the trainer of the attempt with the given folder said that it made no optimizer step.
made_no_step() {
  [ -d "$1/ends" ] && grep -qsE '^[0-9]+ 0 ' "$1"/ends*/* && ! grep -qsE '^[0-9]+ ([1-9]|\?)' "$1"/ends*/*
}

# Fail if this attempt and those before it began at the same checkpoint, and none has saved a later one. Attempts that were told
# to stop before they made a step neither count nor break the row.
require_progress() {
  counts_as_attempt || return 0
  if got_further "$FIRST_CHECKPOINT"; then
    echo got further >"$DYPO_LOGS/stuck_at"
    return
  fi
  echo "${FIRST_CHECKPOINT:-no checkpoint}" >"$DYPO_LOGS/stuck_at"
  local number
  number=$(attempts_stuck_in_a_row)
  [ "$number" -lt "$MAX_STUCK" ] \
    || fail "$number attempts in a row began at the same checkpoint (${FIRST_CHECKPOINT:-none yet}) in $RUN_DIR/checkpoints, and none saved a" \
      "later one: see why in their logs, give a save more time (GRACE_S and the lead of --signal) or save more often (checkpoint.every)," \
      "then submit again to resume"
}

# Tell whether this attempt could have got further: its trainer has started, and was not told to stop before it made a step.
counts_as_attempt() {
  [ "$TRAINER_STARTS" -gt 0 ] || return 1
  [ -z "$OVERRAN" ] || return 0
  ! grep -qs . "$DYPO_LOGS"/ends*/* || grep -qsvE '^(75|143) 0 ' "$DYPO_LOGS"/ends*/* || return 1
  grep -qs . "$DYPO_LOGS"/ends*/* || [ ! -f "$DYPO_LOGS/stopped" ]
}

# Print how many attempts, up to this one, have ended where this one did.
attempts_stuck_in_a_row() {
  local earlier number=0 file
  for ((earlier = ATTEMPT; earlier >= 0; earlier--)); do
    file=$LOG_ROOT/${SLURM_JOB_NAME:-dypo}/$JOB.$earlier/stuck_at
    [ -f "$file" ] || continue
    cmp -s "$file" "$DYPO_LOGS/stuck_at" || break
    number=$((number + 1))
  done
  echo "$number"
}
