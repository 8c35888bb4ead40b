"""Prompts → groups of rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from megatron_dypo.metrics.logs import warn_often
from megatron_dypo.metrics.progress import Progress
from megatron_dypo.metrics.progress import progress as progress_bar
from megatron_dypo.processes.garbage import only_short_collections
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.processes.watchdog import WORK, mark
from megatron_dypo.rollout.attempts import GroupDroppedError
from megatron_dypo.rollout.balance import NoServerError
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.counts import ClientCounts
from megatron_dypo.rollout.groups import Planner, sample_group
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.types import DropReason, Prompt, RolloutGroup

Outcome: TypeAlias = "RolloutGroup | DroppedGroup | NoServerError | None"
"""The outcome for one prompt. None: the group was not done when the collection stopped."""

_BEGUN_TOGETHER = 64
"""Groups that begin in one turn of the event loop."""
_SIGN_OF_LIFE_S = 1.0
"""Seconds between signs of life for the watchdog."""

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
    """Rollouts in complete groups."""
    tokens: int
    """Response tokens of these rollouts."""
    truncated: int
    """Rollouts that hit the length limit."""
    dropped: tuple[DroppedGroup, ...]
    """Prompts without a group, with the reason."""
    client: ClientCounts
    """Counts of the client."""
    unserved: tuple[Prompt, ...]
    """Prompts for which no server was left. Ask for them again after a refit. The counts above leave them out."""
    unfinished: tuple[Prompt, ...]
    """Prompts whose groups ``stop`` interrupted. The run that resumes asks for them again. The counts above leave them
    out."""
    seconds: float

    @property
    def retries(self) -> int:
        """Requests beyond the first of each prompt."""
        return self.client.retries

    @property
    def wrong_versions(self) -> int:
        """Rollouts dropped because weights of a wrong version sampled them."""
        return self.client.wrong_versions


def collect(
    prompts: Sequence[Prompt],
    client: SGLangClient,
    *,
    group_size: int,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed_of: Callable[[Prompt], int] | None = None,
    planner: Planner | None = None,
    progress: bool = True,
    desc: str = "rollouts",
    stop: StopFlag | None = None,
    on_group: Callable[[RolloutGroup], None] | None = None,
    with_routes: bool = True,
) -> tuple[list[RolloutGroup], CollectStats]:
    """Sample ``group_size`` rollouts of each prompt, many prompts at once, in the order of ``prompts``.

    A group is complete or absent: an incomplete one is retried, then dropped and counted. ``temperature`` and
    ``max_new_tokens`` override the client's configuration (evaluation); ``seed_of`` gives the seed of a prompt's one
    rollout; ``planner`` the parts of a group, without which one request samples it. When no server is left, it returns
    the groups that it has. So it does when ``stop`` is set: it aborts the requests that are open, and
    ``stats.unfinished`` holds their prompts. An interrupt aborts them too. ``on_group`` gets each
    group as soon as it is complete, one at a time, in a thread. ``with_routes``: bring the servers' choice of experts
    too, if the client asks for it.

    Raises:
        ServerDiedError: the run has lost its servers for good (from the client's ``check``).
    """
    sampling = client.sampling(
        group_size, temperature=temperature, max_new_tokens=max_new_tokens, with_routes=with_routes
    )
    start = time.monotonic()
    # Their threads start with the first rollouts that a plan has judged, and the first group.
    judging = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judging")
    noting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="groups")
    with judging, noting, progress_bar(len(prompts) * group_size, desc, "responses", enabled=progress) as bar:

        async def ask(prompt: Prompt, own: Sampling) -> RolloutGroup:
            group = await sample_group(client, prompt, own, planner=planner, worker=judging)
            if on_group is not None:
                noted = asyncio.get_running_loop().run_in_executor(noting, on_group, group)
                await asyncio.shield(noted)  # a whole group is noted even if the collection is stopped now
            return group

        with only_short_collections():
            outcomes = asyncio.run(_collect(prompts, client, sampling, seed_of, ask, bar, stop))
    groups = [outcome for outcome in outcomes if isinstance(outcome, RolloutGroup)]
    return groups, _stats(prompts, outcomes, client.counts(), time.monotonic() - start)


def _stats(
    prompts: Sequence[Prompt], outcomes: Sequence[Outcome], counts: ClientCounts, seconds: float
) -> CollectStats:
    pairs = list(zip(prompts, outcomes, strict=True))
    unserved = tuple(prompt for prompt, outcome in pairs if isinstance(outcome, NoServerError))
    unfinished = tuple(prompt for prompt, outcome in pairs if outcome is None)
    groups = [outcome for outcome in outcomes if isinstance(outcome, RolloutGroup)]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return CollectStats(
        prompts=len(prompts) - len(unserved) - len(unfinished),
        rollouts=len(rollouts),
        tokens=sum(len(rollout.tokens) for rollout in rollouts),
        truncated=sum(rollout.finish == "length" for rollout in rollouts),
        dropped=tuple(outcome for outcome in outcomes if isinstance(outcome, DroppedGroup)),
        client=counts,
        unserved=unserved,
        unfinished=unfinished,
        seconds=seconds,
    )


def _seeded(sampling: Sampling, prompt: Prompt, seed_of: Callable[[Prompt], int] | None) -> Sampling:
    return sampling if seed_of is None else replace(sampling, seeds=(seed_of(prompt),))


async def _collect(
    prompts: Sequence[Prompt],
    client: SGLangClient,
    sampling: Sampling,
    seed_of: Callable[[Prompt], int] | None,
    ask: Callable[[Prompt, Sampling], Awaitable[RolloutGroup]],
    bar: Progress,
    stop: StopFlag | None,
) -> list[Outcome]:
    """Ask for all groups at once; return when each has an outcome, at the first bug, or at ``stop``."""
    async with client:
        samplings = [_seeded(sampling, prompt, seed_of) for prompt in prompts]
        groups: list[asyncio.Future[RolloutGroup]] = []
        watch, life = asyncio.ensure_future(client.watch()), asyncio.ensure_future(show_life(WORK.pace.part))
        outcomes = _Outcomes(prompts, bar, sampling.n)
        watch.add_done_callback(lambda _: outcomes.over.set())
        try:
            with set_at_stop(outcomes.over, stop):
                for place, (prompt, own) in enumerate(zip(prompts, samplings, strict=True)):
                    groups.append(asyncio.ensure_future(ask(prompt, own)))
                    groups[-1].add_done_callback(functools.partial(outcomes.note, place))
                    if place % _BEGUN_TOGETHER == 0:
                        await asyncio.sleep(0)
                await outcomes.over.wait()
            if outcomes.has_unserved:
                # A connection may break before the server has ended. The check tells whether the last one is gone.
                await asyncio.wait([watch], timeout=client.watch_turn_s)
            if watch.done():
                watch.result()  # raises the error of the check
            return outcomes.take()
        finally:
            tasks: list[asyncio.Future[Any]] = [*groups, watch, life]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Outcomes:
    """The outcomes of a collection as they come in; ``over`` is set at the last one, or at the first bug."""

    def __init__(self, prompts: Sequence[Prompt], bar: Progress, group_size: int) -> None:
        self._prompts, self._bar, self._group_size = prompts, bar, group_size
        self._outcomes: list[Outcome] = [None] * len(prompts)
        self._num_left = len(prompts)
        self._bug: BaseException | None = None
        self.over = asyncio.Event()
        if not prompts:
            self.over.set()

    def note(self, place: int, group: asyncio.Future[RolloutGroup]) -> None:
        """Enter the outcome of the prompt at ``place``."""
        if group.cancelled():
            return
        error, prompt = group.exception(), self._prompts[place]
        if error is None:
            self._outcomes[place] = group.result()
        elif isinstance(error, GroupDroppedError):
            self._outcomes[place] = dropped_group(prompt, error)
        elif isinstance(error, NoServerError):
            self._outcomes[place] = error
        else:
            self._bug = error
        if not isinstance(error, NoServerError):
            self._bar.update(self._group_size)
        self._num_left -= 1
        if self._num_left == 0 or self._bug is not None:
            self.over.set()

    @property
    def has_unserved(self) -> bool:
        """Whether no server was left for a prompt."""
        return any(isinstance(outcome, NoServerError) for outcome in self._outcomes)

    def take(self) -> list[Outcome]:
        """Return the outcomes in the order of the prompts; raise the first bug, if there was one."""
        if self._bug is not None:
            raise self._bug
        return self._outcomes


def dropped_group(prompt: Prompt, error: GroupDroppedError) -> DroppedGroup:
    """Return the record of a group that will not come, and log it."""
    warn_often(_log, "dropped the group of prompt %s: %s", prompt.prompt_id, error)
    return DroppedGroup(prompt=prompt, reason=error.reason, message=str(error))


@contextlib.contextmanager
def set_at_stop(event: asyncio.Event, stop: StopFlag | None) -> Iterator[None]:
    """Set an event of this loop when any thread sets ``stop``."""
    loop = asyncio.get_running_loop()
    with stop.calling(lambda: loop.call_soon_threadsafe(event.set)) if stop else contextlib.nullcontext():
        yield


async def show_life(doing: str) -> None:
    """Tell the watchdog that this rank is alive while it waits for servers: requests have their own deadlines."""
    while True:
        mark(doing)
        await asyncio.sleep(_SIGN_OF_LIFE_S)
