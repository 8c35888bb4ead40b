"""The servers as the loop sees them: weights go there, groups of rollouts come back. Called by all ranks.

Only leaders of replicas ask servers, but a push takes every rank. So when leaders are left without a server, all ranks
agree to push the weights again, to whatever server has come back meanwhile, and the leaders ask on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.batching.exchange import broadcast_object, gather_objects
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.run import Run
from megatron_dypo.loop.tally import tally_client, tally_push
from megatron_dypo.rollout.collect import DroppedGroup, collect
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.types import Prompt, RolloutGroup

log = logging.getLogger("megatron_dypo")

_MAX_FRUITLESS = 3


def push(run: Run) -> dict[str, float]:
    """Bring the servers to the weights of ``run.step``, and send requests to those alone; nothing to do without servers."""
    if run.bridge is None:
        return {}
    leader = run.leader
    # What a stream has in flight may end before the push or after it. A push of the same version, to servers that came
    # back, narrows nothing: what the one before it allowed may still be in flight.
    before = [version for version in run.pushed if version != run.step][-1:]
    recent = range(before[0], run.step + 1, run.step - before[0]) if before else range(run.step, run.step + 1)
    if leader and leader.background:
        leader.background.accept(recent)
    with run.timings.measure("refit"):
        pushed = run.bridge.refit(run.step)
    if run.layout.is_global_leader:
        tally_push(run.tally, pushed)
    if run.router is not None:
        run.router.serve(run.bridge.serving)
    if leader and leader.client and leader.background_client:
        leader.client.serve(run.bridge.serving, range(run.step, run.step + 1))
        serve = leader.background.serve if leader.background else leader.background_client.serve
        serve(run.bridge.serving, recent)
    run.served_version, run.pushed = run.step, tuple(recent)
    return {
        "refit/seconds": pushed.seconds,
        "refit/pause_s": pushed.pause_seconds,
        "refit/bytes": float(pushed.bytes),
    }


def release(run: Run) -> None:
    """Let the servers' memory go until the next push, where the config says so."""
    if run.bridge is not None:
        run.bridge.release()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What came of the prompts of one replica."""

    groups: list[RolloutGroup] = field(default_factory=list)
    """Complete groups, by the order of their draws."""
    dropped: list[DroppedGroup] = field(default_factory=list)

    @classmethod
    def without_rollouts(cls, prompts: Sequence[Prompt]) -> Sampled:
        return cls(groups=[RolloutGroup(prompt=prompt, rollouts=()) for prompt in prompts])


def sample(run: Run, prompts: Sequence[Prompt], part: str, **options: Any) -> Sampled:
    """Sample the groups of this replica's ``prompts``, however many servers die meanwhile. Collective over the world.

    Args:
        prompts: () off the leaders.
        part: of the step's time, to which this counts.
        options: of :func:`megatron_dypo.rollout.collect.collect`.

    Raises:
        RunEnded: on all ranks: no server is left, or pushes go well and a rank cannot reach the servers.
    """
    sampled = Sampled()
    fruitless = 0
    while True:
        found, prompts, failure = _ask(run, prompts, part, options)
        sampled.groups.extend(found.groups)
        sampled.dropped.extend(found.dropped)
        if failures := gather_anywhere(run, failure):
            raise RunEnded(Cause.SERVERS_GONE, failures[0])
        if not anywhere(run, bool(prompts)):
            sampled.groups.sort(key=lambda group: group.prompt.order)
            return sampled
        came_back = len(found.groups) + len(found.dropped)
        fruitless = 0 if anywhere(run, came_back > 0) else fruitless + 1
        if fruitless == _MAX_FRUITLESS:
            raise RunEnded(
                Cause.SERVERS_GONE,
                f"no SGLang server can be reached, though {fruitless - 1} pushes in a row went well",
            )
        if run.layout.is_global_leader:
            log.warning("no server is reachable; pushing version %d again", run.step)
        push(run)


def _ask(
    run: Run, prompts: Sequence[Prompt], part: str, options: dict[str, Any]
) -> tuple[Sampled, Sequence[Prompt], str | None]:
    """One attempt: what came back, the prompts that no server took, and why no server will ever take one."""
    if not run.leader or not prompts:
        return Sampled(), prompts, None
    assert run.leader.client is not None
    try:
        with run.timings.measure(part):
            groups, stats = collect(prompts, run.leader.client, progress=run.layout.is_global_leader, **options)
    except ServerDiedError as error:
        return Sampled(), prompts, str(error)
    tally_client(run.tally, stats.client)
    return Sampled(groups=groups, dropped=list(stats.dropped)), stats.unserved, None


def gather_anywhere(run: Run, value: str | None) -> list[str]:
    """The values of all leaders that have one; the same answer on every rank."""
    found = gather_objects(value, run.leader.group) if run.leader else []
    return broadcast_object([one for one in found if one is not None], run.layout.replica_group)


def anywhere(run: Run, value: bool) -> bool:
    """Whether ``value`` holds on any leader; the same answer on every rank. Other ranks' values do not count."""
    found = any(gather_objects(value, run.leader.group)) if run.leader else False
    return broadcast_object(found, run.layout.replica_group)
