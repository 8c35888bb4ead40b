"""A round of collection: groups that the journal holds are taken from it, the others are sampled, graded and added."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.no_journal import NoJournal
from megatron_dypo.loop.requests import planner_of
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.collect import DroppedGroup, collect
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup


class Parts(Protocol):
    """The parts of a run that a round uses; see :class:`megatron_dypo.loop.collect.Collector`."""

    @property
    def objective(self) -> Objective: ...

    @property
    def rollout(self) -> RolloutConfig: ...

    @property
    def seed(self) -> int: ...

    @property
    def servers(self) -> Servers | NoServers: ...

    @property
    def journal(self) -> Journal | NoJournal: ...

    @property
    def timings(self) -> Timings: ...

    @property
    def stop(self) -> StopFlag: ...


def sample_round(
    parts: Parts, prompts: Sequence[Prompt], step: int
) -> tuple[list[GradedGroup], Sequence[DroppedGroup]]:
    """Return the graded groups of ``prompts`` by the order of their draws, and the dropped ones. Collective.

    Raises:
        RunEnded: as :meth:`megatron_dypo.loop.servers.Servers.sample`. The groups that were finished are in the
            journal.
    """
    journal, servers, k = parts.journal, parts.servers, parts.rollout.group_size
    found = [(prompt, journal.recall(prompt, version=step)) for prompt in prompts]
    graded = [group for _, group in found if isinstance(group, GradedGroup)]
    ungraded = [group for _, group in found if isinstance(group, RolloutGroup)]
    ask = functools.partial(
        collect,
        group_size=parts.objective.num_rollouts(k),
        planner=planner_of(parts.objective, k, step=lambda: step, seed=parts.seed, judge=servers.judge),
        stop=parts.stop,
        on_group=journal.add,
    )
    sampled = servers.sample([prompt for prompt, group in found if group is None], step, "gen", ask)
    with parts.timings.measure("reward"):
        judged = servers.grade([*ungraded, *sampled.groups])
    journal.judge(judged)
    return sorted([*graded, *judged], key=lambda group: group.prompt.order), sampled.dropped
