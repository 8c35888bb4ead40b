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

SERVER_FAULT_S = 4.0
"""Time for which a server fails."""
SLOW_S = 0.3
"""Time that a slow server takes longer for each answer."""
SLOW_FILE_S = 0.1
"""Time that a slow disk takes longer for each file."""
DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Told:
    """Text in which a user sees a fault, and which a run without faults does not have."""

    where: Literal["status.json", "the terminal", "the log"]
    words: str
    """Its description in the table."""
    pattern: str
    """Regular expression that finds it. ``{victim}`` is the rank with the fault, ``{later}`` a date from the day
    after tomorrow on. The text of ``status.json`` is ``<cause>, rank <rank>: <message>``."""

    def __str__(self) -> str:
        return f"{self.where}: {self.words}"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric in which a user sees a fault: in one step at least it is ``at_least`` or more."""

    name: str
    at_least: float

    def __str__(self) -> str:
        return f"`{self.name}`"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault."""

    outcome: Outcome
    victim: tuple[int, ...] = ()
    """Exit statuses that the rank with the fault may have; −9 is SIGKILL."""
    others: tuple[int, ...] = ()
    """Exit statuses that the other ranks may have."""
    phases: tuple[str, ...] = PHASES
    told_by: tuple[Told | Metric, ...]
    """All places in which a user sees it. Text is told of each start that ends, a metric once for all phases."""
    deadline_s: float = 60.0
    """Longest time from the fault to the end of the last rank, or to the next sign of life beyond a usual step."""
    may_lose_verdicts: bool = False
    """Whether groups in the hands of a verifier may be lost, so that the model is another one."""


def _status(cause: Cause, words: str = "", pattern: str = "") -> Told:
    name = cause.label
    return Told(where="status.json", words=f"{name}{words}", pattern=f"^{name}, {pattern}")


_LOST = Cause.RANK_LOST.status
_TERMINATED = Cause.TERMINATED.status
_BUG, _MEMORY, _DISK, _STOPPED, _NAN, _DONE = (
    cause.status
    for cause in (Cause.BUG, Cause.OUT_OF_MEMORY, Cause.DISK_FULL, Cause.STOPPED, Cause.NOT_FINITE, Cause.DONE)
)
_TOLD_LOST = (_status(Cause.RANK_LOST),)
_TOLD_BUG = (_status(Cause.BUG, ", with the rank", "rank {victim}: "),)


def _server_times(at_least: float) -> tuple[Metric, ...]:
    return tuple(Metric(name=f"timing_s/{part}", at_least=at_least) for part in ("gen", "refit", "eval"))


ROWS: Mapping[str, Row] = {
    "SIGKILL": Row(outcome="ends", victim=(-9,), others=(_LOST,), told_by=_TOLD_LOST),
    "exit": Row(outcome="ends", victim=(9,), others=(_LOST,), told_by=_TOLD_LOST),
    "sys.exit": Row(outcome="ends", victim=(_BUG,), others=(_BUG,), told_by=_TOLD_BUG),
    "an error": Row(outcome="ends", victim=(_BUG,), others=(_BUG,), told_by=_TOLD_BUG),
    "out of memory": Row(
        outcome="ends",
        victim=(_MEMORY,),
        others=(_MEMORY,),
        told_by=(_status(Cause.OUT_OF_MEMORY, ", with the rank", "rank {victim}: "),),
    ),
    "disk full": Row(
        outcome="ends",
        victim=(_DISK,),
        others=(_DISK, _LOST),
        told_by=(Told(where="the terminal", words="disk_full", pattern="disk_full"),),
    ),
    "torn write": Row(outcome="ends", victim=(-9,), others=(_LOST,), told_by=_TOLD_LOST),
    # The last step of a run ends it anyway.
    **dict.fromkeys(
        ("a request to stop", "SIGTERM"),
        Row(outcome="ends", victim=(_STOPPED, _DONE), others=(_STOPPED, _DONE), told_by=(_status(Cause.STOPPED),)),
    ),
    "SIGTERM twice": Row(
        outcome="ends",
        victim=(_TERMINATED,),
        others=(_TERMINATED, _LOST),
        phases=("scoring", "update", "save", "export"),  # one SIGTERM ends a run that waits for servers
        told_by=(_status(Cause.TERMINATED, ", with the rank", "rank {victim}: ended at once by a second SIGTERM"),),
    ),
    "NaN in a weight": Row(
        outcome="ends",
        victim=(_NAN,),
        others=(_NAN,),
        phases=("scoring", "update", "refit", "evaluation"),
        told_by=(
            _status(Cause.NOT_FINITE, ", with the parameter", r".*weight \S+\.mlp\.linear_fc2\.weight"),
            Metric(name="train/skipped", at_least=1.0),
        ),
    ),
    "NaN in a weight that no token reads": Row(
        outcome="ends",
        victim=(_NAN,),
        others=(_NAN,),
        phases=("rollouts", "update", "evaluation"),
        told_by=(
            _status(
                Cause.NOT_FINITE,
                ", before the next refit or checkpoint, with the parameter",
                r".*weight \S*word_embeddings\.weight",
            ),
        ),
    ),
    "NaN in a gradient": Row(
        outcome="ends",
        victim=(_NAN,),
        others=(_NAN,),
        phases=("update",),
        told_by=(
            _status(Cause.NOT_FINITE, ", with the parameter", r".*gradient of \S+\.mlp\.linear_fc2\.weight"),
            Metric(name="train/skipped", at_least=1.0),
        ),
    ),
    "NaN in a log-prob": Row(
        outcome="ends",
        victim=(_NAN,),
        others=(_NAN,),
        phases=("scoring",),
        told_by=(
            _status(
                Cause.NOT_FINITE,
                ", with prompt, member and token",
                r".*old_logp, which the loss reads, is not finite for \S+ \(member \d+, token ",
            ),
            Metric(name="train/skipped", at_least=1.0),
        ),
    ),
    "SIGSTOP": Row(
        outcome="goes on",
        told_by=(
            Told(
                where="the log",
                words="`stall: …` with rank, host, activity and stack",
                pattern=r"stall: rank {victim} on \S+ \(process \d+\) has given no sign of life .* it was \w.* at .* <",
            ),
            Metric(name="timing_s/step", at_least=10.0),
        ),
    ),
    "slow disk": Row(outcome="goes on", told_by=(Metric(name="timing_s/save_checkpoint", at_least=SLOW_FILE_S),)),
    "clock step": Row(
        outcome="goes on",
        told_by=(
            Told(where="the log", words="the times of its lines", pattern="^{later} "),
            Told(where="the log", words="the time of day was set", pattern=r"time of day was set by [+-]\d{{5,}} s"),
            Metric(name="perf/clock_step_s", at_least=DAY_S / 2),
        ),
    ),
    "verifiers killed": Row(
        outcome="goes on",
        phases=GRADED,
        told_by=(
            Told(where="the log", words="a verifier process was killed", pattern="verifier process killed by SIGKILL"),
            Metric(name="rollout/verifiers_replaced", at_least=1.0),
        ),
        may_lose_verdicts=True,
    ),
    "a server answers 503": Row(
        outcome="goes on",
        phases=ASKED,
        told_by=(
            Told(where="the log", words="a server takes no request now", pattern="a server takes no request now"),
            *_server_times(SERVER_FAULT_S / 2),
        ),
    ),
    "a server is slow": Row(outcome="goes on", phases=ASKED, told_by=_server_times(SLOW_S)),
    "a server hangs": Row(outcome="goes on", phases=ASKED, told_by=_server_times(SERVER_FAULT_S / 2)),
    "a server is gone": Row(
        outcome="goes on",
        phases=ASKED,
        told_by=(
            Told(where="the log", words="a server is fenced", pattern=r"server \S+ is fenced and gets no requests"),
            Told(where="the log", words="no more requests go to it", pattern="no more requests to http"),
            Metric(name="refit/fenced", at_least=1.0),
            Metric(name="refit/rejoined", at_least=1.0),
        ),
    ),
}
"""Name of a fault → what follows. A launcher passes SIGTERM, SIGINT and SIGUSR1 on as a request to stop (SIGUSR1)."""
