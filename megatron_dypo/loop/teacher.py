"""A teacher's log-probs of waiting groups. If any rollout of a group gets none, its prompt is dropped and counted.

Only leaders ask, each for the groups of its own replica. Nothing here is collective.
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
    """The outcome of asking the teacher for the waiting groups."""

    asked: int = 0
    """Rollouts that the teacher was asked about."""
    answered: int = 0
    """Rollouts that got their log-probs."""
    dropped: tuple[str, ...] = ()
    """The reason for each dropped group."""


class NoTeacher:
    """The teacher of a run whose objective reads no teacher, and of all ranks that are no leaders."""

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
    """Returns whether the objective reads the teacher's log-probs of a group."""
    show_progress: bool
    stop: StopFlag = STOP
    """Interrupts the requests when it is set. Groups without an answer wait on, for the run that resumes."""

    def missing(self, queues: Queues) -> list[Sample]:
        """Return the waiting rollouts that lack log-probs that the objective reads."""
        return without_teacher_logp(filter(self.reads, queues.groups()))

    def complete(self, queues: Queues) -> TeacherReport:
        """Set ``teacher_logp`` of every waiting rollout; remove the groups for which the teacher gave none."""
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
    """Return the rollouts without the teacher's log-probs."""
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
