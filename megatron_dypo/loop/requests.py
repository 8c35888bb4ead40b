"""The requests of a rank to the servers. Only leaders of replicas send any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_dypo.grading.verify import Verifier, grade
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.no_journal import NoJournal
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.groups import Planner
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.rollout.stream_state import StreamCounts
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup, Verdict


def planner_of(
    objective: Objective,
    group_size: int,
    *,
    step: Callable[[], int],
    seed: int,
    judge: Callable[[RolloutGroup], Sequence[Verdict]],
) -> Planner | None:
    """Return the planner that puts groups together as the objective says; ``step`` gives the step that collects.

    None: the objective has no plans of its own, so that one request samples a whole group.
    """
    if type(objective).plan_group is Objective.plan_group:
        return None
    return Planner(plan=lambda prompt: objective.plan_group(prompt, group_size, step=step(), seed=seed), judge=judge)


def judge_rollouts(group: RolloutGroup, verifier: Verifier, fail_truncated: bool) -> Sequence[Verdict]:
    """Judge the rollouts of a group that is not complete yet."""
    return grade([group], verifier, fail_truncated, show_progress=False)[0].verdicts


class NoStream:
    """The rollout stream of a rank that asks no server: it is always empty."""

    error: BaseException | None = None
    is_unserved = False

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def postpone(self, prompts: Sequence[Prompt]) -> None: ...

    def want(self, count: int) -> None: ...

    def wait(self, timeout_s: float, useful: int = 1, resolved: int = 1) -> None: ...

    def take(self) -> tuple[list[GradedGroup], StreamCounts]:
        return [], StreamCounts()

    def still(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def unfinished(self) -> list[int]:
        return []


Stream = RolloutStream[GradedGroup] | NoStream


@dataclass(frozen=True, kw_only=True)
class LeaderRequests:
    """The requests of a replica's leader: groups for the loop, groups from the background, and their verdicts."""

    client: SGLangClient
    stream: RolloutStream[GradedGroup]
    """The stream. It has its own client, since it runs while ``client`` evaluates."""
    verifier: Verifier
    fail_truncated: bool
    trace_text: Callable[[Prompt], str | None] | None
    """Returns the trace that the verifier judges beside the rollouts of a prompt."""
    show_progress: bool
    journal: Journal | NoJournal = field(default_factory=NoJournal)
    """Holds the groups that are finished, for a resume."""

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        """Give each group its verdicts and its tier."""
        return grade(
            groups,
            self.verifier,
            self.fail_truncated,
            trace_text=self.trace_text,
            show_progress=self.show_progress,
        )

    @property
    def num_replaced(self) -> int:
        """Return the number of verifier processes that were replaced since the start."""
        return self.verifier.num_replaced

    def judge(self, group: RolloutGroup) -> Sequence[Verdict]:
        """Return the verdicts of the rollouts of a group that is not whole yet."""
        return judge_rollouts(group, self.verifier, self.fail_truncated)

    def accept(self, recent: range) -> None:
        """Accept groups of these versions from the stream. Called before a refit."""
        self.stream.accept(recent)

    def use_servers(self, urls: Sequence[str], version: int, recent: range) -> None:
        """Send requests to ``urls``; accept groups of ``version``, and of ``recent`` from the stream. Called after a
        refit."""
        self.client.use_servers(urls, range(version, version + 1))
        self.stream.use_servers(urls, recent)


@dataclass(frozen=True, kw_only=True)
class FollowerRequests:
    """The requests of any other rank: none."""

    stream: NoStream = field(default_factory=NoStream)
    journal: NoJournal = field(default_factory=NoJournal)

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        return []

    @property
    def num_replaced(self) -> int:
        return 0

    def judge(self, group: RolloutGroup) -> Sequence[Verdict]:
        return ()

    def accept(self, recent: range) -> None: ...

    def use_servers(self, urls: Sequence[str], version: int, recent: range) -> None: ...
