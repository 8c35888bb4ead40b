"""A teacher's log-probs for what waits: every rollout of a group has them, or the prompt is dropped and counted.

Only leaders ask, for the groups of their own replicas; nothing here is collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from megatron_dypo.batching.queues import Group, Queues
from megatron_dypo.checks import require
from megatron_dypo.config.tree import Config
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.processes.stop_requests import STOP, StopFlag
from megatron_dypo.rollout.teacher.client import NoLogprobsError, TeacherClient
from megatron_dypo.rollout.teacher.logprobs import teacher_logprobs
from megatron_dypo.types import Sample, SampleKind


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """The outcome of asking for what waits."""

    asked: int = 0
    """Rollouts."""
    answered: int = 0
    """Those of them that have their log-probs now."""
    dropped: tuple[str, ...] = ()
    """For each group that was dropped, why."""


class NoTeacher:
    """The teacher of a run whose objective reads none, and of all ranks that are no leaders."""

    def missing(self, queues: Queues) -> list[Sample]:
        """Return nothing."""
        return []

    def complete(self, queues: Queues) -> TeacherReport:
        """Do nothing."""
        return TeacherReport()


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher of a leader whose objective reads its log-probs."""

    client: TeacherClient
    reads: Callable[[Group], bool]
    """Tells whether the objective reads the teacher's log-probs of a group."""
    show_progress: bool
    stop: StopFlag = STOP
    """Ends the asking when it is set; groups without an answer go on waiting, for the run that resumes."""

    def missing(self, queues: Queues) -> list[Sample]:
        """Return the rollouts that wait without the log-probs that the objective reads."""
        return without_teacher_logp(filter(self.reads, queues.groups()))

    def complete(self, queues: Queues) -> TeacherReport:
        """Give every rollout that waits its ``teacher_logp``; take the groups out for which the teacher gave none."""
        samples = self.missing(queues)
        answers = teacher_logprobs(samples, self.client, stop=self.stop, progress=self.show_progress)
        failures: dict[int, str] = {}
        given: dict[tuple[int, int], Sample] = {}
        for sample, answer in zip(samples, answers, strict=True):
            if isinstance(answer, NoLogprobsError):
                failures[sample.order] = str(answer)
            elif answer is not None:
                given[sample.order, sample.member] = replace(sample, teacher_logp=answer)
        queues.take(list(failures))
        queues.replace([[given.get((s.order, s.member), s) for s in group] for group in queues.groups()])
        return TeacherReport(asked=len(samples), answered=len(given), dropped=tuple(failures.values()))


def without_teacher_logp(groups: Iterable[Group]) -> list[Sample]:
    """Return the rollouts that the teacher has not given log-probs of."""
    return [s for group in groups for s in group if s.kind is SampleKind.ROLLOUT and s.teacher_logp is None]


def require_logprob_sources(config: Config, objective: Objective) -> None:
    """Raise ValueError where the objective reads a teacher's log-probs and the config names no server of one, or forces
    a teacher's tokens, of which no server gives log-probs, and the config has the servers' for π_old.
    """
    require(
        config.old_logp.source == "trainer" or not objective.forces_prefixes(),
        "old_logp.source=server",
        f"must be trainer: objective.name={config.objective.name} has rollouts go on from a teacher's tokens, of which "
        "servers give no log-probs",
    )
    require(
        bool(config.teacher_servers.urls) or not objective.needs_teacher_logp(),
        "teacher_servers.urls=()",
        f"objective.name={config.objective.name} reads a teacher's log-probs of rollouts: name the teacher's servers",
    )
