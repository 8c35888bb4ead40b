"""Refit: the trainer's weights into the running SGLang servers, between two steps, without a restart.

A refit pauses all servers, moves every tensor by the configured transport (upon which they forget cached prefixes), names
the new version and lets the servers go on. A server that is lost on the way is fenced, and the refit is made again to the
rest, which stay paused meanwhile; sending the same weights again does no harm. Either all servers that are left end at
the new version or the refit fails on every rank: servers that may hold a mixture are then marked by a version that is no
number, and their running requests are aborted.

Running requests: with ``in_flight: pause`` they are retracted, not frozen in place: they lose their KV cache and go on
from recomputed keys and values, so that no token of the new version is sampled from the old version's cache. (The tokens
that they already have stay; their ``weight_versions`` tell the two apart.) With ``abort`` they end.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.parallel import device
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.refit.control import Answer, Deadline, ServerError, SGLangControl
from megatron_dypo.refit.model_checks import check_names, check_server, check_shapes
from megatron_dypo.refit.servers import RefitReport, Servers, Watch, answering
from megatron_dypo.refit.transports.base import Lockstep, RefitError, Source, Transport
from megatron_dypo.refit.transports.broadcast import BroadcastTransport
from megatron_dypo.refit.transports.choose import ChosenTransport, Kind
from megatron_dypo.refit.transports.disk import DiskTransport
from megatron_dypo.refit.transports.planned import PlannedTransport

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECOVERY_S = 10.0
_MAX_ATTEMPTS = 4
_POLL_S = 0.5


@dataclass(kw_only=True)
class _Refit:
    """One refit under way; what it found is the same on every rank."""

    version: int
    deadline: Deadline
    start: float = field(default_factory=time.monotonic)
    paused_at: float | None = None
    attempts: int = 0


class Refitter:
    """The way from the training mesh to the servers; made once, then :meth:`refit` after each update."""

    def __init__(
        self,
        layout: Layout,
        arch: Architecture,
        named_params: Callable[[], Iterable[tuple[str, Tensor]]],
        *,
        urls: Sequence[str],
        api_key: str | None,
        config: RefitConfig,
        run_dir: Path,
        hf_reference: Path,
        watch: Watch | None = None,
    ) -> None:
        """Collective over the world; talks to no server yet.

        ``named_params`` yields this rank's parameters under Megatron-Core names with global layer indices.
        ``hf_reference`` is the HF folder whose config the servers serve; ``transport: disk`` writes below
        ``run_dir/refit``, which the servers must be able to read under the same path. ``watch`` is asked on the
        global leader alone.
        """
        self._source = Source(layout=layout, arch=arch, named_params=named_params)
        self._config = config
        self._lockstep = Lockstep(config.deadline_s + 2 * _RECOVERY_S)
        leads = layout.is_global_leader or self._source.own_turn is not None
        self._control = SGLangControl(urls, api_key) if leads else None
        self._is_leader = layout.is_global_leader
        self._servers = Servers(urls, logs=self._is_leader)
        self._watch = watch or Watch()
        self._transport = self._make_transport(run_dir, hf_reference)
        self._is_verified = False
        self._is_dirty = False
        self._released: set[str] = set()

    @property
    def serving(self) -> tuple[str, ...]:
        """The servers that hold the weights of the last refit; no other may get requests."""
        return self._servers.serving

    def refit(self, version: int) -> RefitReport:
        """Bring all servers that answer to the current weights, named ``version``. Collective over the world.

        Fenced servers that answer again take part; one that is lost is fenced, and the rest get the weights.

        Raises:
            RefitError: on every rank, naming server, call and answer: no server is to blame, or none is left;
                generation goes on. A later refit may succeed.
            RuntimeError: another rank was lost, within ``deadline_s`` and some seconds.
        """
        refit = _Refit(version=version, deadline=Deadline(self._config.deadline_s))
        fenced, rejoined = self._servers.num_fenced, self._servers.num_rejoined
        try:
            self._gather_servers(refit)
            num_bytes = self._refit_to_the_rest(refit)
        except RefitError:
            self._abandon(version)
            self._lockstep.run()  # no rank ends the job before the servers go on
            raise
        except BaseException:
            self._abandon(version)
            raise
        assert refit.paused_at is not None
        return RefitReport(
            version=version,
            seconds=time.monotonic() - refit.start,
            pause_seconds=time.monotonic() - refit.paused_at,
            bytes=self._lockstep.total(num_bytes),
            fenced=self._servers.num_fenced - fenced,
            rejoined=self._servers.num_rejoined - rejoined,
            retries=refit.attempts - 1,
        )

    def release(self) -> None:
        """Let the servers' memory go until the next refit, where the config says so; a server that refuses keeps it.

        Collective over the world.
        """
        if self._config.release_memory:
            self._lead(self._release)

    def close(self) -> None:
        """Leave the servers' groups and stop the control thread. Not collective."""
        self._transport.close()
        if self._control is not None:
            self._control.close()
            self._control = None

    def _make_transport(self, run_dir: Path, hf_reference: Path) -> Transport:
        config, common = self._config, (self._source, self._control, self._lockstep)
        if config.transport == "disk":
            return DiskTransport(*common, run_dir / "refit", hf_reference)
        bucket_bytes = config.bucket_mb * 2**20
        planned = functools.partial(
            PlannedTransport,
            *common,
            bucket_bytes=bucket_bytes,
            verify=config.verify,
            quantization=config.quantize,
        )
        make: dict[Kind, Callable[[], Transport]] = {
            "local": functools.partial(planned, kind="local"),
            "p2p": functools.partial(planned, kind="p2p"),
        }
        if config.quantize == "none":
            make["broadcast"] = functools.partial(
                BroadcastTransport, *common, backend=device.backend(), bucket_bytes=bucket_bytes
            )
        return ChosenTransport(config.transport, make, self._control if self._is_leader else None, self._lockstep)

    def _gather_servers(self, refit: _Refit) -> None:
        """Fence the servers that were lost since the last refit, take in those that answer again."""
        before = self.serving
        self._fence_lost()
        if self.serving != before:
            self._transport.reset()
        left = self.serving
        self._take_in(refit)
        if self.serving != left == before:
            self._transport.close()  # in order, telling those that are served by the old connections
        self._await_one(refit)
        self._point_control()

    def _refit_to_the_rest(self, refit: _Refit) -> int:
        """Attempts until one succeeds; returns the bytes that left this rank."""
        while True:
            refit.attempts += 1
            try:
                return self._attempt(refit)
            except RefitError as error:
                self._transport.reset()
                lost = self._led(functools.partial(self._blamed, error)) if refit.paused_at else error.lost
                self._servers.fence(dict.fromkeys(lost, f"refit of version {refit.version}: {error}"))
                if not lost or refit.attempts == _MAX_ATTEMPTS:
                    raise
                self._await_one(refit)
                self._point_control()

    def _attempt(self, refit: _Refit) -> int:
        # Half of the time, so that as much is left for the rest if a server hangs; all of it for the last one.
        deadline = refit.deadline.half() if len(self.serving) > 1 else refit.deadline
        if not self._is_verified:
            self._verify(deadline)
            self._is_verified = True
        refit.paused_at = refit.paused_at or time.monotonic()
        self._lead(functools.partial(self._open, deadline))
        self._is_dirty = True
        num_bytes = self._transport.send(refit.version, deadline)
        self._lead(functools.partial(self._finish, refit.version, deadline))
        self._is_dirty = False
        return num_bytes

    def _fence_lost(self) -> None:
        lost = self._led(lambda: dict(self._watch.take_lost()))
        self._servers.fence(lost)
        self._released -= lost.keys()

    def _take_in(self, refit: _Refit) -> None:
        fenced = self._servers.fenced
        if fenced:
            arch = self._source.arch
            back = self._led(lambda: answering(self._leader_control, fenced, arch))
            self._servers.rejoin(back, refit.version)

    def _await_one(self, refit: _Refit) -> None:
        """Wait until a server is there to refit: fenced ones may come back.

        Raises:
            RefitError: none will, or none did before the deadline.
        """
        while not self.serving:
            self._fence_lost()  # so that the next refit does not take a server for lost that this one saw back
            self._take_in(refit)
            if not self.serving:
                self._lead(functools.partial(self._expect_one, refit.deadline))

    def _expect_one(self, deadline: Deadline) -> None:
        if not self._watch.may_return():
            raise ServerError(f"no server is left to refit: {self._servers.reasons}")
        deadline.remaining()
        time.sleep(_POLL_S)

    def _blamed(self, error: RefitError) -> tuple[str, ...]:
        """The servers that failed an attempt, which all others wait for, paused.

        One that gives no answer now is to blame for what the others answered; otherwise those are that refused.
        """
        steps: list[tuple[str, Answer | None]] = [("/pause_generation", {"mode": "retract"})]
        if self._transport.in_session:
            steps += [("/end_weight_update", {})]
        control = self._leader_control
        silent = [failed for failed in control.attempt(steps, _RECOVERY_S) if failed.is_silent]
        if silent:
            return tuple(dict.fromkeys(url for failed in silent for url in failed.urls))
        control.attempt([("/pause_generation", {"mode": "abort"})], _RECOVERY_S, error.lost)
        return error.lost

    def _point_control(self) -> None:
        if self._control is not None:
            self._control.urls = self.serving

    def _led(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the leader, on every rank."""
        found = self._lockstep.run(action if self._is_leader else None)
        return next(value for value in self._lockstep.gather(found) if value is not None)

    def _lead(self, action: Callable[[], None]) -> None:
        self._lockstep.run(action if self._is_leader else None)

    def _verify(self, deadline: Deadline) -> None:
        """SGLang ignores unknown names and dies of wrong shapes, so both are checked before anything is sent."""
        held = self._lockstep.run(self._held_names if self._source.layout.is_sender else None)
        by_rank = self._lockstep.gather(held)
        self._lead(functools.partial(check_names, [names for names in by_rank if names], self._source.arch))
        self._lead(functools.partial(self._check_servers, deadline))

    def _held_names(self) -> list[str]:
        """The HF tensors that leave this rank."""
        layout = self._source.layout
        check_shapes(self._source.params(), self._source.arch, layout.tensor, layout.expert_tensor)
        return [spec.name for spec in self._source.specs()]

    def _check_servers(self, deadline: Deadline) -> None:
        for info in self._leader_control.describe(deadline):
            check_server(info, self._source.arch)

    def _release(self) -> None:
        urls = set(self.serving) - self._released
        # A server that is busy would die of the release; one that was paused before is not.
        for path, body in (("/pause_generation", {"mode": "retract"}), ("/release_memory_occupation", {})):
            for error in self._leader_control.attempt([(path, body)], self._config.deadline_s, tuple(urls)):
                logger.warning("a server keeps its memory: %s", error)
                urls -= set(error.urls)
        self._released |= urls

    def _open(self, deadline: Deadline) -> None:
        control = self._leader_control
        # Only those that let it go: the others would die of this.
        for url in self._released & set(control.urls):
            control.resume_memory(url, deadline)
            self._released.discard(url)
        if self._config.in_flight == "abort":
            control.pause("abort", deadline)
        # After an abort too: this drains the scheduler, so that no update's flush of the cache can be refused.
        control.pause("retract", deadline)
        if self._transport.in_session:
            control.begin_update(deadline)

    def _finish(self, version: int, deadline: Deadline) -> None:
        control = self._leader_control
        if self._transport.in_session:
            control.end_update(deadline)
        control.set_version(str(version), deadline)
        for url, served in zip(control.urls, control.weight_versions(deadline), strict=True):
            if served != str(version):
                raise ServerError(f"{url}: weight_version={served!r} after the refit of version {version}", url)
        control.resume(deadline)

    def _abandon(self, version: int) -> None:
        """After a failure: close connections, so that no server waits for us, and let all servers go on."""
        self._transport.reset()
        if not self._is_leader:
            return
        steps: list[tuple[str, Answer | None]] = []
        if self._transport.in_session:
            steps += [("/end_weight_update", {})]
        if self._is_dirty:
            mark = {"new_version": f"failed-{version}", "abort_all_requests": True}
            steps += [("/update_weight_version", mark), ("/flush_cache", {})]
        steps += [("/continue_generation", {})]
        for error in self._leader_control.attempt(steps, _RECOVERY_S):
            logger.info("after the failed refit of version %d: %s", version, error)

    @property
    def _leader_control(self) -> SGLangControl:
        assert self._control is not None, "closed, or not a leader"
        return self._control
