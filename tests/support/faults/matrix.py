"""The faults that a run may meet, the phases in which each is tried, and what must follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_dypo.ending import Cause

PHASES = ("start", "rollouts", "scoring", "update", "refit", "evaluation", "save", "export")
"""The phases of a step, in the order in which a run meets them; ``export`` comes once, at the end."""
ASKED = ("start", "rollouts", "refit", "evaluation")
"""Phases in which servers are asked."""
GRADED = ("rollouts", "evaluation")

LAYOUTS: Mapping[str, dict[str, int]] = {"two replicas": {}, "two tensor ranks": {"tensor": 2}}

Outcome = Literal["ends", "goes on"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault."""

    outcome: Outcome
    victim: tuple[int, ...] = ()
    """Exit statuses that the rank with the fault may have; −9 is SIGKILL."""
    others: tuple[int, ...] = ()
    """Exit statuses that the other ranks may have."""
    phases: tuple[str, ...] = PHASES
    told_by: str
    """Where a user sees it."""
    deadline_s: float = 60.0
    """Longest time from the fault to the end of the last rank, or to the next sign of life."""


_LOST = Cause.RANK_LOST.status
_BUG, _MEMORY, _DISK, _STOPPED, _NAN, _DONE = (
    cause.status
    for cause in (Cause.BUG, Cause.OUT_OF_MEMORY, Cause.DISK_FULL, Cause.STOPPED, Cause.NOT_FINITE, Cause.DONE)
)
_SERVER_TIMES = "`timing_s/gen`, `timing_s/refit`"
_SERVER_LOST = "the log; `refit/fenced`, `refit/rejoined`, `rollout/retries`"

ROWS: Mapping[str, Row] = {
    "SIGKILL": Row(outcome="ends", victim=(-9,), others=(_LOST,), told_by="status.json: rank_lost"),
    "exit": Row(outcome="ends", victim=(9,), others=(_LOST,), told_by="status.json: rank_lost"),
    "sys.exit": Row(outcome="ends", victim=(_BUG,), others=(_BUG,), told_by="status.json: bug, with the rank"),
    "an error": Row(outcome="ends", victim=(_BUG,), others=(_BUG,), told_by="status.json: bug, with the rank"),
    "out of memory": Row(
        outcome="ends", victim=(_MEMORY,), others=(_MEMORY,), told_by="status.json: out_of_memory, with the rank"
    ),
    "disk full": Row(
        outcome="ends", victim=(_DISK,), others=(_DISK, _LOST), told_by="the terminal: disk_full, with the file"
    ),
    "torn write": Row(outcome="ends", victim=(-9,), others=(_LOST,), told_by="status.json: rank_lost"),
    "a request to stop": Row(  # the last step of a run ends it anyway
        outcome="ends", victim=(_STOPPED, _DONE), others=(_STOPPED, _DONE), told_by="status.json: stopped"
    ),
    "NaN in a weight": Row(
        outcome="ends",
        victim=(_NAN,),
        others=(_NAN,),
        phases=("scoring", "update", "refit", "evaluation"),
        told_by="status.json: not_finite, with the parameter; `train/skipped`",
    ),
    "NaN in a weight that no token reads": Row(
        outcome="ends",
        victim=(_NAN,),
        others=(_NAN,),
        phases=("rollouts", "update", "evaluation"),
        told_by="status.json: not_finite, before the next checkpoint, with the parameter",
    ),
    "SIGSTOP": Row(outcome="goes on", told_by="the log: `stall: …` with rank, host, activity and stack"),
    "slow disk": Row(outcome="goes on", told_by="`timing_s/save_checkpoint`"),
    "clock step": Row(outcome="goes on", told_by="the times in the log"),
    "verifiers killed": Row(
        outcome="goes on", phases=GRADED, told_by="the log: a verifier process died; `rollout/verifier_errors`"
    ),
    "a server answers 503": Row(
        outcome="goes on",
        phases=ASKED,
        told_by="the log: a server takes no request now; `timing_s/gen`, `timing_s/refit`",
    ),
    "a server is slow": Row(outcome="goes on", phases=ASKED, told_by="`timing_s/gen`, `timing_s/refit`"),
    "a server hangs": Row(
        outcome="goes on", phases=ASKED, told_by="the log; `refit/fenced`, `refit/rejoined`, `rollout/retries`"
    ),
    "a server is gone": Row(
        outcome="goes on", phases=ASKED, told_by="the log; `refit/fenced`, `refit/rejoined`, `rollout/retries`"
    ),
}
"""Name of a fault → what follows. A launcher passes SIGTERM, SIGINT and SIGUSR1 on as a request to stop."""
