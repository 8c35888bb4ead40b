"""The servers as the loop sees them: they get weights and return groups of rollouts. Called by all ranks.

Only leaders of replicas ask servers, but every rank takes part in a refit. So if leaders are left without a server, all
ranks agree to refit the servers that have come back in the meantime, and the leaders continue to ask.

A run that asks no server has :class:`NoServers`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.books.outcomes import end_on_request
from megatron_dypo.loop.books.tally import Tally, tally_client, tally_refit
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.no_journal import NoJournal
from megatron_dypo.loop.journal.weights import NoWeights, Weights
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.requests import FollowerRequests, LeaderRequests, NoStream, Stream
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.collect import CollectStats, DroppedGroup
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup, Verdict

log = logging.getLogger("megatron_dypo")

_MAX_FRUITLESS = 3


class Refitter(Protocol):
    """Brings the trainer's weights to the servers; see :class:`megatron_dypo.refit.refitter.Refitter`."""

    @property
    def serving(self) -> tuple[str, ...]: ...

    def refit(self, version: int) -> RefitReport: ...

    def release(self) -> None: ...


class Router(Protocol):
    """Sends requests on to servers; see :class:`megatron_dypo.rollout.router.Router`."""

    def use_servers(self, servers: Sequence[str]) -> None: ...


Ask = Callable[..., tuple[list[RolloutGroup], CollectStats]]


class NoRouter:
    """The router if requests go to servers directly, and on all ranks except one."""

    def use_servers(self, servers: Sequence[str]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Groups of one replica's prompts."""

    groups: list[RolloutGroup] = field(default_factory=list)
    """Complete groups, by the order of their draws."""
    dropped: list[DroppedGroup] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The result of one leader's attempt to sample its prompts."""

    failure: str = ""
    """Why no server will ever answer again; empty if one may."""
    is_stopped: bool = False
    """Whether a request to stop the run interrupted the attempt."""
    unserved: int = 0
    """Prompts for which no server was left."""
    came_back: int = 0
    """Prompts whose group came back or was dropped."""


@dataclass(kw_only=True)
class Servers:
    """The servers of a run that asks some."""

    refitter: Refitter
    requests: LeaderRequests | FollowerRequests
    router: Router | NoRouter
    ranks: Ranks
    tally: Tally
    timings: Timings
    weights: Weights | NoWeights = field(default_factory=NoWeights)
    versions: tuple[int, ...] = ()
    """Versions that servers may hold during a refit, ascending: that of the last refit, and the different version
    before it."""
    num_replaced: int = 0
    """Verifier processes that had been replaced by the last refit."""

    @property
    def stream(self) -> Stream:
        """Return this replica's groups in the background."""
        return self.requests.stream

    @property
    def journal(self) -> Journal | NoJournal:
        """Return the journal of this replica's finished groups."""
        return self.requests.journal

    def refit(self, version: int) -> dict[str, float]:
        """Bring the current weights, ``version``, to the servers; send requests only to servers that have them. Return
        metrics."""
        # A group in flight may end before or after the refit, so both versions are accepted. If this refit only brings
        # the same version to servers that came back, groups of the version before may still be in flight.
        before = [held for held in self.versions if held != version][-1:]
        recent = range(before[0], version + 1, version - before[0]) if before else range(version, version + 1)
        self.requests.accept(recent)
        with self.timings.measure("refit"):
            self.weights.note(version)  # before a server can sample with them
            self.journal.serve(version)
            report = self.refitter.refit(version)
        if self.ranks.is_global_leader:
            tally_refit(self.tally, report)
        self.tally.add("verifiers_replaced", self.requests.num_replaced - self.num_replaced)
        self.num_replaced = self.requests.num_replaced
        if self.refitter.serving:  # else the run was asked to stop, and needs none
            self.router.use_servers(self.refitter.serving)
            self.requests.use_servers(self.refitter.serving, version, recent)
        self.versions = tuple(recent)
        return {
            "refit/seconds": report.seconds,
            "refit/pause_s": report.pause_seconds,
            "refit/bytes": float(report.bytes),
        }

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        """Give each of this replica's groups its verdicts and its tier."""
        return self.requests.grade(groups)

    def judge(self, group: RolloutGroup) -> Sequence[Verdict]:
        """Return the verdicts of the rollouts of a group that is not whole yet."""
        return self.requests.judge(group)

    def offload_servers(self) -> None:
        """Let the servers release their memory until the next refit, if the config asks for it."""
        self.refitter.release()

    def sample(self, prompts: Sequence[Prompt], version: int, part: str, ask: Ask) -> Sampled:
        """Sample the groups of this replica's ``prompts``, even if servers die in between. Collective over the world.

        Args:
            prompts: () on ranks that are no leaders.
            version: version of the weights that the servers hold, or get again if all were lost.
            part: name of the timing that this counts towards.
            ask: :func:`megatron_dypo.rollout.collect.collect` with its options.

        Raises:
            RunEnded: on all ranks: no server is left; refits succeed, but a leader cannot reach the servers; or the run
                was asked to stop. In the last case the new groups are lost, and all prompts stay unfinished.
        """
        sampled, fruitless = Sampled(), 0
        while True:
            failure, came_back, is_stopped = "", 0, False
            if prompts and isinstance(self.requests, LeaderRequests):
                try:
                    with self.timings.measure(part):
                        groups, stats = ask(prompts, self.requests.client, progress=self.requests.show_progress)
                except ServerDiedError as error:
                    failure = str(error)
                else:
                    tally_client(self.tally, stats.client)
                    sampled.groups.extend(groups)
                    sampled.dropped.extend(stats.dropped)
                    prompts, came_back = stats.unserved, len(groups) + len(stats.dropped)
                    is_stopped = bool(stats.unfinished)
            mine = Attempt(failure=failure, is_stopped=is_stopped, unserved=len(prompts), came_back=came_back)
            found = self.ranks.of_leaders(mine)
            if any(attempt.is_stopped for attempt in found):
                raise end_on_request()
            if not any(attempt.failure or attempt.unserved for attempt in found):
                sampled.groups.sort(key=lambda group: group.prompt.order)
                return sampled
            fruitless = 0 if any(attempt.came_back for attempt in found) else fruitless + 1
            _end_if_lost(found, fruitless)
            if self.ranks.is_global_leader:
                log.warning("no server is reachable; refitting version %d again", version)
            self.refit(version)


def _end_if_lost(found: Sequence[Attempt], fruitless: int) -> None:
    """Raise RunEnded if no server will ever answer again, or after too many ``fruitless`` attempts in a row."""
    if failures := [attempt.failure for attempt in found if attempt.failure]:
        raise RunEnded(Cause.SERVERS_GONE, failures[0])
    if fruitless == _MAX_FRUITLESS:
        raise RunEnded(
            Cause.SERVERS_GONE, f"no SGLang server can be reached, though {fruitless - 1} refits in a row went well"
        )


class NoServers:
    """The servers of a run that asks none: no remaining step needs rollouts, and nothing is evaluated."""

    stream = NoStream()
    journal = NoJournal()
    weights = NoWeights()

    def sample(self, prompts: Sequence[Prompt], version: int, part: str, ask: Ask) -> Sampled:
        """Raise RuntimeError: this call is a bug."""
        raise RuntimeError(f"step {version} asks for rollouts, and this run has no servers")

    def grade(self, groups: Sequence[RolloutGroup]) -> list[GradedGroup]:
        """Raise RuntimeError: this call is a bug."""
        raise RuntimeError("this run samples nothing, so it has no verifier")

    def judge(self, group: RolloutGroup) -> Sequence[Verdict]:
        """Raise RuntimeError: to ask is a bug."""
        raise RuntimeError("there is no verifier where nothing is sampled")

    def refit(self, version: int) -> dict[str, float]:
        """Do nothing: there is no server."""
        return {}

    def offload_servers(self) -> None:
        """Do nothing."""
