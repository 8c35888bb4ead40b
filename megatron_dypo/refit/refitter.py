"""Refit: bring the trainer's weights to the running SGLang servers, between two steps, without a restart.

A refit pauses all servers and sends every tensor by the configured transport; the servers then drop cached prefixes.
It sets the new version and lets the servers generate again. A server that is lost during the refit is fenced: it gets
no requests and no weights. The refit is then repeated for the other servers, which stay paused until then; receiving
the same weights twice does no harm. Either all remaining servers end with the new version, or the refit fails on every
rank. Servers that may hold a mixture of weights then get a version that is no number, and their running requests are
aborted.

With ``in_flight: pause`` running requests are retracted: they lose their KV cache and continue from recomputed keys and
values, so that no token of the new version is sampled from the old version's cache. They keep their tokens, and their
``weight_versions`` tell which version sampled which. With ``abort`` they end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.bridged import WholeWeights
from megatron_dypo.parallel import device
from megatron_dypo.parallel.groups import MeshRank, wait_for_all
from megatron_dypo.refit.answers import ServerError
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.leader import Leader
from megatron_dypo.refit.lockstep import Lockstep, RefitError
from megatron_dypo.refit.model_checks import check_model
from megatron_dypo.refit.server_memory import ServerMemory
from megatron_dypo.refit.servers import RefitReport, RefitUnderWay, Servers, Watch, recovered_servers
from megatron_dypo.refit.source import Source, WholeSource
from megatron_dypo.refit.transports.base import Connection
from megatron_dypo.refit.transports.connect import connect
from megatron_dypo.refit.transports.disk import DiskConnection
from megatron_dypo.refit.transports.threads import drop_frames
from megatron_dypo.refit.update_calls import RECOVERY_S, abort_update, begin_update, end_update, find_culprits

_MAX_ATTEMPTS = 4
_RETRY_S = 0.5
"""Seconds between two probes while no server answers. A server does not announce that it is up again."""


class _GivenUpError(Exception):
    """No server is left, and the run is about to stop."""


class Refitter:
    """Brings weights from the training mesh to the servers. Make it once; call :meth:`refit` after each update."""

    def __init__(
        self,
        layout: MeshRank,
        arch: Architecture,
        named_params: Callable[[], Iterable[tuple[str, Tensor]]],
        *,
        urls: Sequence[str],
        api_key: str | None,
        config: RefitConfig,
        run_dir: Path,
        hf_reference: Path,
        watch: Watch | None = None,
        values: Callable[[Tensor], Tensor] = Tensor.detach,
        whole: WholeWeights | None = None,
    ) -> None:
        """Collective over the world. It makes no call to a server yet.

        Args:
            named_params: yields this rank's parameters under Megatron-Core names with global layer indices.
            run_dir: ``refit.transport: disk`` writes below ``run_dir/refit``, which the servers must be able to read
                under the same path.
            hf_reference: HF folder with the config that the servers serve.
            values: returns a parameter, or a dequantised copy of one in FP8.
            whole: sends the weights of a model without a name table, in place of ``named_params``.
            watch: knows which servers died. Only the global leader asks it.
        """
        if whole is None:
            self._source = Source(layout=layout, arch=arch, named_params=named_params, values=values)
        else:
            self._source = WholeSource(layout=layout, arch=arch, named_params=named_params, weights=whole)
        self._config = config
        self._in_session = config.transport != "disk"
        self._folder, self._hf_reference = run_dir / "refit", hf_reference
        # A rank may come minutes after the others, and the next group waits only as long as a refit may take.
        wait_for_all(layout)
        self._lockstep = Lockstep(config.deadline_s + 2 * RECOVERY_S)
        leads = layout.is_global_leader or self._source.own_turn is not None
        self._control = SGLangControl(urls, api_key) if leads else None
        self._leader = Leader(self._control if layout.is_global_leader else None, self._lockstep)
        self._servers = Servers(urls, logs=layout.is_global_leader)
        self._watch = watch or Watch()
        self._connection: Connection | None = None
        self._is_verified = False
        self._is_dirty = False
        self._memory = ServerMemory()

    @property
    def serving(self) -> tuple[str, ...]:
        """Return the servers that hold the weights of the last refit. Only these may get requests."""
        return self._servers.serving

    def refit(self, version: int) -> RefitReport:
        """Bring the current weights, named ``version``, to all servers that answer. Collective over the world.

        Fenced servers that answer again take part. A server that is lost is fenced, and the others get the weights. If
        none is left and the run was asked to stop, the refit ends without one: :attr:`serving` is empty.

        Raises:
            RefitError: on every rank, naming server, call and answer: the failure is no server's fault, or no server is
                left. Generation continues, and a later refit may succeed.
            RuntimeError: another rank was lost, within ``deadline_s`` and some seconds.
        """
        refit = RefitUnderWay(version=version, deadline=Deadline(self._config.deadline_s))
        fenced, rejoined = self._servers.num_fenced, self._servers.num_rejoined
        num_bytes = None
        try:
            self._gather_servers(refit)
            while num_bytes is None:
                try:
                    num_bytes = self._attempt(refit)
                except RefitError as error:
                    self._fence_culprits(refit, error)
        except _GivenUpError:
            self._abort(version)
            num_bytes = 0
        except RefitError:
            self._abort(version)
            self._lockstep.run()  # no rank may end the job before the servers generate again
            raise
        except BaseException:
            self._abort(version)
            raise
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
        """Let the servers release their memory until the next refit, if the config asks for it. Collective.

        A server that refuses keeps its memory.
        """
        if self._config.offload_servers:
            self._leader.run(self._memory.release, self._config.deadline_s)

    def close(self) -> None:
        """Leave the servers' groups and close the control. Not collective. No call may follow."""
        self._leave()
        if self._control is not None:
            self._control.close()

    def _attempt(self, refit: RefitUnderWay) -> int:
        """Bring the weights to all servers that are not fenced; return the bytes that this rank sent."""
        refit.attempts += 1
        # Use half of the time, so that the other half is left for the other servers if one hangs. The last server gets
        # all of it.
        deadline = refit.deadline.split() if len(self.serving) > 1 else refit.deadline
        if not self._is_verified:
            check_model(self._source, self._lockstep, self._leader, deadline, self._config.transport)
            self._is_verified = True
        refit.paused_at = min(refit.paused_at, time.monotonic())
        if self._config.offload_servers:
            device.empty_cache()  # the servers are about to allocate it
        self._leader.run(self._memory.resume, deadline)
        self._leader.run(begin_update, self._config.in_flight, self._in_session, deadline)
        self._is_dirty = True
        self._connection = self._connection or self._connect(deadline)
        num_bytes = 0
        for step in self._connection.steps(refit.version, deadline):
            num_bytes += self._lockstep.run(step) or 0
        self._leader.run(end_update, refit.version, self._in_session, deadline)
        self._is_dirty = False
        return num_bytes

    def _connect(self, deadline: Deadline) -> Connection:
        if self._config.transport == "disk":
            return DiskConnection(self._source, self._leader.control, self._folder, self._hf_reference)
        return connect(self._source, self._control, self._lockstep, self._config, deadline)

    def _fence_culprits(self, refit: RefitUnderWay, error: RefitError) -> None:
        """Fence the servers that made an attempt fail, so that it can be repeated with the others.

        Raises:
            RefitError: no server is at fault, or none is left.
        """
        self._drop_connection()
        drop_frames(error)
        lost = error.lost
        if refit.paused_at < math.inf:
            lost = self._leader.ask(find_culprits, error, self._in_session)
        self._servers.fence(dict.fromkeys(lost, f"refit of version {refit.version}: {error}"))
        if not lost or refit.attempts == _MAX_ATTEMPTS:
            raise error
        self._wait_for_server(refit)
        self._retarget()

    def _gather_servers(self, refit: RefitUnderWay) -> None:
        """Fence the servers that were lost since the last refit, and take back those that answer again."""
        before = self.serving
        self._fence_lost()
        if self.serving != before:
            self._drop_connection()
        left = self.serving
        self._readmit(refit)
        if self.serving != left == before:
            self._leave()  # an orderly end, with calls to the servers of the old connection
        self._wait_for_server(refit)
        self._retarget()

    def _fence_lost(self) -> None:
        lost = self._leader.ask(lambda _: dict(self._watch.take_lost()))
        self._servers.fence(lost)
        self._memory.forget(lost)

    def _readmit(self, refit: RefitUnderWay) -> None:
        """Take back the fenced servers that have recovered."""
        fenced = self._servers.fenced
        if fenced:
            back = self._leader.ask(recovered_servers, fenced, self._source.arch)
            self._servers.rejoin(back, refit.version)

    def _wait_for_server(self, refit: RefitUnderWay) -> None:
        """Wait until at least one server can be refitted; fenced servers may come back.

        Raises:
            RefitError: no server will come back, or none did before the deadline.
            _GivenUpError: on every rank: the run was asked to stop.
        """
        while not self.serving:
            if self._leader.ask(lambda _: self._watch.is_stopping()):
                raise _GivenUpError
            # Read the reports now, so that the next refit does not fence a server that is already back.
            self._fence_lost()
            self._readmit(refit)
            if not self.serving:
                self._leader.run(self._pause_between_probes, refit.deadline)

    def _pause_between_probes(self, _: SGLangControl, deadline: Deadline) -> None:
        if not self._watch.may_return():
            raise ServerError(f"no server is left to refit: {self._servers.reasons}")
        deadline.remaining()
        time.sleep(_RETRY_S)

    def _retarget(self) -> None:
        """Send all further calls to the servers that are not fenced."""
        if self._control is not None:
            self._control.urls = self.serving

    def _abort(self, version: int) -> None:
        """Drop the connection after a failure, so that no server waits for it, and let all servers generate again."""
        self._drop_connection()
        if self._leader.control is not None:
            abort_update(self._leader.control, version, in_session=self._in_session, is_dirty=self._is_dirty)

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
