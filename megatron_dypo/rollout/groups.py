"""Sample groups of rollouts according to their plans. All groups share one event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.plan import GroupPart, GroupPlan
from megatron_dypo.rollout.sampling import Sampling, group_seeds
from megatron_dypo.types import Prompt, Rollout, RolloutGroup, Tokens, Verdict

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Planner:
    """A planner of the groups of a collection. It also judges rollouts if later ones of the group depend on them."""

    plan: Callable[[Prompt], GroupPlan]
    judge: Callable[[RolloutGroup], Sequence[Verdict]]
    """Called in a worker thread with the rollouts of one step of a plan."""


async def sample_group(
    client: SGLangClient, prompt: Prompt, sampling: Sampling, *, planner: Planner | None, worker: Executor
) -> RolloutGroup:
    """Sample one group: return all of it, or raise.

    Args:
        sampling: parameters of a whole group; ``n`` and ``max_new_tokens`` of a part follow from them.
        planner: None: sample ``sampling.n`` rollouts from the prompt.
        worker: the executor that runs ``planner.judge``.

    Raises:
        GroupDroppedError, NoServerError: :meth:`SGLangClient.generate` raised it for one of the parts.
    """
    if planner is None:
        seeded = _seeded(sampling, prompt, range(sampling.n))
        return RolloutGroup(prompt=prompt, rollouts=await client.generate(prompt.tokens, seeded))
    plan, rollouts, verdicts = planner.plan(prompt), list[Rollout](), list[Verdict]()
    parts = plan.first
    while parts:
        version = max((rollout.policy_version for rollout in rollouts), default=None)
        ends = itertools.accumulate((part.count for part in parts), initial=len(rollouts))
        asked = await _together(
            _sample_part(client, prompt, _seeded(sampling, prompt, range(begin, begin + part.count)), part, version)
            for part, begin in zip(parts, ends, strict=False)
        )
        sampled = [rollout for part in asked for rollout in part]
        rollouts += sampled
        if plan.then is None:
            break
        group = RolloutGroup(prompt=prompt, rollouts=tuple(sampled))
        verdicts += await asyncio.get_running_loop().run_in_executor(worker, planner.judge, group)
        # A group with a rollout without a verdict will be dropped: do not sample more of it.
        parts = () if any(verdict.error is not None for verdict in verdicts) else plan.then(verdicts)
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts), verdicts=tuple(verdicts))


def _seeded(sampling: Sampling, prompt: Prompt, places: range) -> Sampling:
    """Return the sampling of the rollouts at ``places`` of a group."""
    if sampling.run_seed is None or sampling.seeds:
        return sampling
    return replace(sampling, seeds=group_seeds(sampling.run_seed, prompt.order, places))


async def _together(parts: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all coroutines; if one fails, cancel the others and raise."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _sample_part(
    client: SGLangClient, prompt: Prompt, sampling: Sampling, part: GroupPart, version: int | None
) -> tuple[Rollout, ...]:
    """Sample one part. ``version`` is the policy version of the rollouts before, for a part that samples nothing."""
    if part.is_whole:
        assert version is not None, "the first parts of a plan are sampled"
        return (_whole(part.prefix, client.decode(part.prefix), version),) * part.count
    prefix = part.prefix[: sampling.max_new_tokens - 1]
    own = replace(sampling, n=part.count, max_new_tokens=sampling.max_new_tokens - len(prefix))
    if not len(prefix):
        return await client.generate(prompt.tokens, own)
    rollouts = await client.generate(np.concatenate([prompt.tokens, prefix]), own)
    return tuple(_behind(prefix, rollout, client) for rollout in rollouts)


def _whole(trace: Tokens, text: str, version: int) -> Rollout:
    return Rollout(
        tokens=trace,
        logp=np.full(len(trace), np.nan, np.float32),
        text=text,
        finish="stop",
        policy_version=version,
        num_forced_tokens=len(trace),
    )


def _behind(prefix: Tokens, sampled: Rollout, client: SGLangClient) -> Rollout:
    """Return the response made of ``prefix`` and the tokens that the policy sampled after it."""
    tokens = np.concatenate([prefix, sampled.tokens]).astype(np.int32)
    return replace(
        sampled,
        tokens=tokens,
        logp=np.concatenate([np.full(len(prefix), np.nan, np.float32), sampled.logp]),
        text=client.decode(tokens),
        version_spans=tuple((version, start + len(prefix)) for version, start in sampled.version_spans),
        num_forced_tokens=len(prefix),
    )
