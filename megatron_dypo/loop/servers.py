"""The servers as the loop sees them: weights go there, groups of rollouts come back. Called by all ranks.

Only leaders of replicas ask servers, but a refit takes every rank. So when leaders are left without a server, all ranks
agree to refit again, with whatever server has come back in the meantime, and the leaders ask on.

A run that asks no server has :class:`NoServers`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.grading.verify import Verifier, grade
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.tally import Tally, tally_client, tally_push
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.refit.servers import PushReport
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import DroppedGroup, collect
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.rollout.stream import RolloutStream, StreamCounts
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup

log = logging.getLogger("megatron_dypo")

_MAX_FRUITLESS = 3


class Refitter(Protocol):
    """Brings servers to the trainer's weights; see :class:`megatron_dypo.refit.refitter.Bridge`."""

    @property
    def serving(self) -> tuple[str, ...]: ...

    def push(self, version: int) -> PushReport: ...

    def release(self) -> None: ...


class Router(Protocol):
    """Sends requests on to servers; see :class:`megatron_dypo.rollout.router.Router`."""

    def serve(self, servers: Sequence[str]) -> None: ...


class NoRouter:
    """Stands where requests go to servers directly, and on all ranks but one."""

    def serve(self, servers: Sequence[str]) -> None: ...


class NoStream:
    """The rollout stream of a rank that asks no server: nothing comes, and nothing is in flight."""

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
class Sampled:
    """Groups of one replica's prompts."""

    groups: list[RolloutGroup] = field(default_factory=list)
    """Complete groups, by the order of their draws."""
    dropped: list[DroppedGroup] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How it went when one leader asked its servers once."""

    failure: str = ""
    """Why no server will ever answer; empty where nothing speaks against that."""
    unserved: int = 0
    """Prompts that no server took."""
    came_back: int = 0
    """Prompts whose group came back, or was dropped."""


@dataclass(frozen=True, kw_only=True)
class LeaderRequests:
    """The requests of a replica's leader: groups for the loop, groups in the background, and their verdicts."""

    client: SGLangClient
    stream: RolloutStream[GradedGroup]
    """Has a client of its own, since it runs while ``client`` evaluates."""
    verifier: Verifier
    fail_truncated: bool
    show_progress: bool

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        """Give each group its verdicts and its tier."""
        return grade(groups, self.verifier, self.fail_truncated, show_progress=self.show_progress)

    def accept(self, recent: range) -> None:
        """Take groups of these versions from the stream, before a refit."""
        self.stream.accept(recent)

    def serve(self, urls: Sequence[str], version: int, recent: range) -> None:
        """Send requests to ``urls``, after a refit; take groups of ``version``, and of ``recent`` from the stream."""
        self.client.serve(urls, range(version, version + 1))
        self.stream.serve(urls, recent)


@dataclass(frozen=True, kw_only=True)
class FollowerRequests:
    """The requests of any other rank: none."""

    stream: NoStream = field(default_factory=NoStream)

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        return []

    def accept(self, recent: range) -> None: ...

    def serve(self, urls: Sequence[str], version: int, recent: range) -> None: ...


@dataclass(kw_only=True)
class Servers:
    """The servers of a run that asks some."""

    refitter: Refitter
    requests: LeaderRequests | FollowerRequests
    router: Router | NoRouter
    ranks: Ranks
    tally: Tally
    timings: Timings
    versions: tuple[int, ...] = ()
    """Versions of the last refit and of the last one before it that was of another version, ascending: what servers may
    hold while a refit is under way."""

    @property
    def stream(self) -> Stream:
        """This replica's groups in the background."""
        return self.requests.stream

    def refit(self, version: int) -> dict[str, float]:
        """Bring the servers to the weights of now, named ``version``, and send requests to those alone; return metrics."""
        # A group that the stream has in flight may end before the refit or after it. A refit of the same version, with
        # servers that came back, narrows nothing: what the one before it allowed may still be in flight.
        before = [pushed for pushed in self.versions if pushed != version][-1:]
        recent = range(before[0], version + 1, version - before[0]) if before else range(version, version + 1)
        self.requests.accept(recent)
        with self.timings.measure("update_weights"):
            report = self.refitter.push(version)
        if self.ranks.is_global_leader:
            tally_push(self.tally, report)
        self.router.serve(self.refitter.serving)
        self.requests.serve(self.refitter.serving, version, recent)
        self.versions = tuple(recent)
        return {"perf/weight_bytes": float(report.bytes), "refit/pause_s": report.pause_seconds}

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        """Give each of this replica's groups its verdicts and its tier."""
        return self.requests.grade(groups)

    def release_memory(self) -> None:
        """Let the servers' memory go until the next refit, where the config says so."""
        self.refitter.release()

    def sample(
        self,
        prompts: Sequence[Prompt],
        version: int,
        part: str,
        *,
        group_size: int,
        temperature: float | None = None,
        seed_of: Callable[[Prompt], int] | None = None,
        desc: str = "rollouts",
    ) -> Sampled:
        """Sample the groups of this replica's ``prompts``, however many servers die meanwhile. Collective over the world.

        Args:
            prompts: () off the leaders.
            version: of the weights that servers hold, or get where all are lost.
            part: of the step's time, to which this counts.
            group_size: rollouts of each prompt; this and the rest are as for ``rollout.collect.collect``.

        Raises:
            RunEnded: on all ranks: no server is left, or refits go well and a rank cannot reach the servers.
        """
        sampled, fruitless = Sampled(), 0
        while True:
            failure, came_back = "", 0
            if prompts and isinstance(self.requests, LeaderRequests):
                try:
                    with self.timings.measure(part):
                        groups, stats = collect(
                            prompts,
                            self.requests.client,
                            group_size=group_size,
                            temperature=temperature,
                            seed_of=seed_of,
                            progress=self.requests.show_progress,
                            desc=desc,
                        )
                except ServerDiedError as error:
                    failure = str(error)
                else:
                    tally_client(self.tally, stats.client)
                    sampled.groups.extend(groups)
                    sampled.dropped.extend(stats.dropped)
                    prompts, came_back = stats.unserved, len(groups) + len(stats.dropped)
            found = self.ranks.of_leaders(Attempt(failure=failure, unserved=len(prompts), came_back=came_back))
            if not any(attempt.failure or attempt.unserved for attempt in found):
                sampled.groups.sort(key=lambda group: group.prompt.order)
                return sampled
            fruitless = 0 if any(attempt.came_back for attempt in found) else fruitless + 1
            _end_if_lost(found, fruitless)
            if self.ranks.is_global_leader:
                log.warning("no server is reachable; pushing version %d again", version)
            self.refit(version)


def _end_if_lost(found: Sequence[Attempt], fruitless: int) -> None:
    """Raise RunEnded where no server will ever answer; ``fruitless`` attempts in a row brought nothing."""
    if failures := [attempt.failure for attempt in found if attempt.failure]:
        raise RunEnded(Cause.SERVERS_GONE, failures[0])
    if fruitless == _MAX_FRUITLESS:
        raise RunEnded(
            Cause.SERVERS_GONE, f"no SGLang server can be reached, though {fruitless - 1} refits in a row went well"
        )


class NoServers:
    """Stands for the servers in a run that asks none: no step that is left needs rollouts, and nothing is evaluated."""

    stream = NoStream()

    def sample(self, prompts: Sequence[Prompt], version: int, part: str, *, group_size: int) -> Sampled:
        """Raise RuntimeError: to ask is a bug."""
        raise RuntimeError(f"step {version} asks for rollouts, and this run has no servers")

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        """Raise RuntimeError: to ask is a bug."""
        raise RuntimeError("there is no verifier where nothing is sampled")

    def refit(self, version: int) -> dict[str, float]:
        """Do nothing: the weights go to no server."""
        return {}

    def release_memory(self) -> None:
        """Do nothing."""
