"""The servers as the loop sees them: weights go there, groups of rollouts come back. Called by all ranks.

Only leaders of replicas ask servers, but a push takes every rank. So when leaders are left without a server, all ranks
agree to push the weights again, to whatever server has come back meanwhile, and the leaders ask on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from megatron_dypo.batching.exchange import broadcast_object, gather_objects
from megatron_dypo.rollout.collect import collect
from megatron_dypo.run import Run
from megatron_dypo.tally import tally_collection, tally_push
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
    with run.timings.measure("update_weights"):
        pushed = run.bridge.push(run.step)
    if run.layout.is_global_leader:
        tally_push(run.tally, pushed)
    if run.router is not None:
        run.router.serve(run.bridge.serving)
    if leader and leader.client and leader.background_client:
        leader.client.serve(run.bridge.serving, range(run.step, run.step + 1))
        serve = leader.background.serve if leader.background else leader.background_client.serve
        serve(run.bridge.serving, recent)
    run.served_version, run.pushed = run.step, tuple(recent)
    return {"perf/weight_bytes": float(pushed.bytes), "refit/pause_s": pushed.pause_seconds}


def release(run: Run) -> None:
    """Let the servers' memory go until the next push, where the config says so."""
    if run.bridge is not None:
        run.bridge.release()


def sample(run: Run, prompts: Sequence[Prompt], part: str, **options: Any) -> list[RolloutGroup]:
    """The groups of this replica's ``prompts``, oldest first, however many servers die meanwhile.

    Args:
        prompts: () off the leaders.
        part: of the step's time, to which this counts.
        options: of :func:`megatron_dypo.rollout.collect.collect`.

    Raises:
        ConnectionError: pushes go well, but this rank cannot reach the servers.
    """
    groups: list[RolloutGroup] = []
    fruitless = 0
    while True:
        num_before = len(groups)
        if run.leader and prompts:
            with run.timings.measure(part):
                assert run.leader.client is not None
                found, stats = collect(prompts, run.leader.client, progress=run.layout.is_global_leader, **options)
            tally_collection(run.tally, stats)
            groups += found
            prompts = stats.unserved
        if not anywhere(run, bool(prompts)):
            return sorted(groups, key=lambda group: group.prompt.order)
        fruitless = 0 if anywhere(run, len(groups) > num_before) else fruitless + 1
        if fruitless == _MAX_FRUITLESS:
            raise ConnectionError(f"no SGLang server can be reached, though {fruitless - 1} pushes in a row went well")
        if run.layout.is_global_leader:
            log.warning("no server is left to ask: pushing version %d once more before going on", run.step)
        push(run)


def anywhere(run: Run, value: bool) -> bool:
    """Whether ``value`` holds on any leader; the same answer on every rank. Other ranks' values do not count."""
    found = any(gather_objects(value, run.leader.group)) if run.leader else False
    return broadcast_object(found, run.layout.replica_group)
