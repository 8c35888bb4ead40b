"""Prompts → groups of rollouts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.metrics.progress import Progress
from megatron_dypo.metrics.progress import progress as progress_bar
from megatron_dypo.processes.watchdog import mark
from megatron_dypo.rollout.balance import NoServerError
from megatron_dypo.rollout.client import GroupDroppedError, SGLangClient
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.rollout.responses import Sampling
from megatron_dypo.types import DropReason, Prompt, RolloutGroup

Outcome: TypeAlias = "RolloutGroup | DroppedGroup | NoServerError"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DroppedGroup:
    """A prompt without a complete group of rollouts."""

    prompt: Prompt
    reason: DropReason
    """``INCOMPLETE`` or ``REFUSED``."""
    message: str


@dataclass(frozen=True, kw_only=True)
class CollectStats:
    """Counts of one :func:`collect`."""

    prompts: int
    """Prompts that a server was asked for."""
    rollouts: int
    """In complete groups."""
    tokens: int
    """Response tokens of these."""
    truncated: int
    """Rollouts that hit the length limit."""
    dropped: tuple[DroppedGroup, ...]
    """Prompts without a group, with the reason."""
    client: ClientCounts
    """What the client counted meanwhile."""
    unserved: tuple[Prompt, ...]
    """Prompts for which no server was left. They are to be asked for again, after a push, and count nowhere above."""
    seconds: float

    @property
    def retries(self) -> int:
        """Requests beyond the first of each prompt."""
        return self.client.retries

    @property
    def wrong_versions(self) -> int:
        """Rollouts dropped because weights of another version than that of the last push sampled them."""
        return self.client.wrong_versions


def collect(
    prompts: Sequence[Prompt],
    client: SGLangClient,
    *,
    group_size: int,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed_of: Callable[[Prompt], int] | None = None,
    progress: bool = True,
    desc: str = "rollouts",
) -> tuple[list[RolloutGroup], CollectStats]:
    """Sample ``group_size`` rollouts of each prompt, many prompts at once, in the order of ``prompts``.

    A group is complete or absent: an incomplete one is retried, then dropped and counted. ``temperature`` and
    ``max_new_tokens`` override the client's configuration (evaluation); ``seed_of`` gives the seed of a prompt's one
    rollout. Interrupted, it aborts what it had asked for.

    When no server is left, it returns what there is.

    Raises:
        ServerDiedError: the run has lost its servers for good (from the client's ``check``).
    """
    sampling = client.sampling(group_size, temperature=temperature, max_new_tokens=max_new_tokens)
    start = time.monotonic()
    with progress_bar(len(prompts) * group_size, desc, "responses", enabled=progress) as bar:
        outcomes = asyncio.run(_collect(prompts, client, lambda prompt: _seeded(sampling, prompt, seed_of), bar))
    groups = [outcome for outcome in outcomes if isinstance(outcome, RolloutGroup)]
    pairs = zip(prompts, outcomes, strict=True)
    unserved = tuple(prompt for prompt, outcome in pairs if isinstance(outcome, NoServerError))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    stats = CollectStats(
        prompts=len(prompts) - len(unserved),
        rollouts=len(rollouts),
        tokens=sum(len(rollout.tokens) for rollout in rollouts),
        truncated=sum(rollout.finish == "length" for rollout in rollouts),
        dropped=tuple(outcome for outcome in outcomes if isinstance(outcome, DroppedGroup)),
        client=client.counts(),
        unserved=unserved,
        seconds=time.monotonic() - start,
    )
    return groups, stats


def _seeded(sampling: Sampling, prompt: Prompt, seed_of: Callable[[Prompt], int] | None) -> Sampling:
    return sampling if seed_of is None else replace(sampling, seed=seed_of(prompt))


async def _collect(
    prompts: Sequence[Prompt], client: SGLangClient, sampling_of: Callable[[Prompt], Sampling], bar: Progress
) -> list[Outcome]:
    async with client:
        tasks = [asyncio.ensure_future(_group(prompt, client, sampling_of(prompt), bar)) for prompt in prompts]
        watch = asyncio.ensure_future(client.watch())
        signs_of_life = asyncio.ensure_future(_show_life())
        groups = asyncio.gather(*tasks)
        try:
            either: set[asyncio.Future[Any]] = {groups, watch}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()  # raises what the check raised
            return groups.result()
        finally:
            for task in (*tasks, watch, signs_of_life):
                task.cancel()
            await asyncio.gather(*tasks, watch, signs_of_life, groups, return_exceptions=True)


async def _show_life() -> None:
    """Tell the watchdog that a wait for rollouts is no hang: requests have a deadline of their own."""
    while True:
        mark("collecting rollouts")
        await asyncio.sleep(1.0)


async def _group(prompt: Prompt, client: SGLangClient, sampling: Sampling, bar: Progress) -> Outcome:
    outcome: Outcome
    try:
        outcome = RolloutGroup(prompt=prompt, rollouts=await client.generate(prompt.tokens, sampling))
    except NoServerError as error:
        return error
    except GroupDroppedError as error:
        warn_often(_log, "dropped the group of prompt %s: %s", prompt.prompt_id, error)
        outcome = DroppedGroup(prompt=prompt, reason=error.reason, message=str(error))
    bar.update(sampling.n)
    return outcome
