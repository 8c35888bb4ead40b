"""Push: the trainer's weights into the running SGLang servers, between two steps, without a restart.

A push pauses all servers, moves every tensor by the configured transport (upon which they forget cached prefixes), names
the new version and lets the servers go on. Either all servers end at the new version or the push fails on every rank: servers that may
hold a mixture are then marked by a version that is no number, and their running requests are aborted.

Running requests: with ``in_flight: pause`` they are retracted, not frozen in place: they lose their KV cache and go on
from recomputed keys and values, so that no token of the new version is sampled from the old version's cache. (The tokens
that they already have stay; their ``weight_versions`` tell the two apart.) With ``abort`` they end.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_dypo.architecture import Architecture, load_architecture
from megatron_dypo.config import WeightsConfig
from megatron_dypo.parallel import device
from megatron_dypo.parallel.layout import Layout
from megatron_dypo.weights.families.registry import family_rows, match
from megatron_dypo.weights.sglang_control import Deadline, ServerError, ServerInfo, SGLangControl
from megatron_dypo.weights.transports.base import Lockstep, PushError, Source, Transport
from megatron_dypo.weights.transports.broadcast import BroadcastTransport
from megatron_dypo.weights.transports.disk import DiskTransport

logger = logging.getLogger(__name__)

_RECOVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What a push cost."""

    version: int
    seconds: float
    """Wall-clock time of the whole push, the servers' pause included."""
    bytes: int
    """Bytes of all tensors, counted once however many servers there are."""


class Bridge:
    """The way from the training mesh to the servers; made once, then :meth:`push` after each update."""

    def __init__(
        self,
        layout: Layout,
        arch: Architecture,
        named_params: Callable[[], Iterable[tuple[str, Tensor]]],
        *,
        urls: Sequence[str],
        api_key: str | None,
        config: WeightsConfig,
        run_dir: Path,
        hf_reference: Path,
    ) -> None:
        """Collective over the world; talks to no server yet.

        ``named_params`` yields this rank's parameters under Megatron-Core names with global layer indices.
        ``hf_reference`` is the HF folder whose config the servers serve; ``transport: disk`` writes below
        ``run_dir/refit``, which the servers must be able to read under the same path.
        """
        self._source = Source(layout=layout, arch=arch, named_params=named_params)
        self._config = config
        self._lockstep = Lockstep(config.deadline_s + 2 * _RECOVERY_S)
        leads = layout.is_global_leader or self._source.own_turn is not None
        self._control = SGLangControl(urls, api_key) if leads else None
        self._is_leader = layout.is_global_leader
        self._transport = self._make_transport(run_dir, hf_reference)
        self._is_verified = False
        self._is_dirty = False

    def push(self, version: int) -> PushReport:
        """Bring all servers to the current weights, named ``version``. Collective over the world.

        Raises:
            PushError: on every rank, naming server, call and answer; generation goes on. A later push may succeed.
            RuntimeError: another rank was lost, within ``deadline_s`` and some seconds.
        """
        try:
            return self._push(version, Deadline(self._config.deadline_s))
        except PushError:
            self._abandon(version)
            self._lockstep.run()  # no rank ends the job before the servers go on
            raise
        except BaseException:
            self._abandon(version)
            raise

    def close(self) -> None:
        """Leave the servers' groups and stop the control thread. Not collective."""
        self._transport.close()
        if self._control is not None:
            self._control.close()
            self._control = None

    def _make_transport(self, run_dir: Path, hf_reference: Path) -> Transport:
        if self._config.transport == "disk":
            return DiskTransport(self._source, self._control, self._lockstep, run_dir / "refit", hf_reference)
        return BroadcastTransport(
            self._source,
            self._control,
            self._lockstep,
            backend=device.backend(),
            bucket_bytes=self._config.bucket_mb * 2**20,
        )

    def _push(self, version: int, deadline: Deadline) -> PushReport:
        start = time.monotonic()
        if not self._is_verified:
            self._verify(deadline)
            self._is_verified = True
        self._lead(functools.partial(self._open, deadline))
        self._is_dirty = True
        num_bytes = self._transport.send(version, deadline)
        self._lead(functools.partial(self._finish, version, deadline))
        self._is_dirty = False
        total = self._lockstep.total(num_bytes)
        return PushReport(version=version, seconds=time.monotonic() - start, bytes=total)

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

    def _open(self, deadline: Deadline) -> None:
        control = self._leader_control
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
                raise ServerError(f"{url}: weight_version={served!r} after the push of version {version}")
        control.resume(deadline)

    def _abandon(self, version: int) -> None:
        """After a failure: close connections, so that no server waits for us, and let all servers go on."""
        self._transport.reset()
        if not self._is_leader:
            return
        steps: list[tuple[str, dict[str, object]]] = []
        if self._transport.in_session:
            steps += [("/end_weight_update", {})]
        if self._is_dirty:
            mark = {"new_version": f"failed-{version}", "abort_all_requests": True}
            steps += [("/update_weight_version", mark), ("/flush_cache", {})]
        steps += [("/continue_generation", {})]
        for error in self._leader_control.attempt(steps, _RECOVERY_S):
            logger.info("after the failed push of version %d: %s", version, error)

    @property
    def _leader_control(self) -> SGLangControl:
        assert self._control is not None, "closed, or not a leader"
        return self._control


def check_shapes(
    named_params: Iterable[tuple[str, Tensor]], arch: Architecture, tp_size: int, etp_size: int = 1
) -> None:
    """That the parameters of one rank are what the rules of their family ask for.

    Raises:
        ValueError: a parameter without a rule, or of another shape than its rule makes.
    """
    for name, param in named_params:
        row = match(name, arch)
        expected = row.rule.mcore_shape(arch, etp_size if row.is_expert else tp_size)
        if tuple(param.shape) != expected:
            raise ValueError(f"{name}: shape {tuple(param.shape)}, the architecture asks for {expected}")


def check_names(names_by_stage: Iterable[Iterable[str]], arch: Architecture) -> None:
    """That every HF tensor of the architecture is sent, and by one stage only.

    Raises:
        ValueError: names the tensors that are missing, sent twice, or not of this architecture.
    """
    counts = Counter(name for names in names_by_stage for name in names)
    expected = {name for row in family_rows(arch) for name in row.hf}
    problems = [f"{name} is held by no stage" for name in sorted(expected - counts.keys())]
    problems += [f"{name} is not of this architecture" for name in sorted(counts.keys() - expected)]
    problems += [f"{name} is sent {count} times" for name, count in sorted(counts.items()) if count > 1]
    if problems:
        raise ValueError("weights to push: " + "; ".join(problems))


def check_server(info: ServerInfo, arch: Architecture) -> None:
    """That a server serves this architecture, as far as it says (and its model folder, where we can read it).

    Raises:
        ServerError: names the fields that differ.
    """
    if info.model_type != arch.family:
        raise ServerError(f"{info.url}: serves model_type={info.model_type!r}, the policy is {arch.family!r}")
    if not (Path(info.model_path) / "config.json").is_file():
        return
    served = load_architecture(info.model_path)
    for name in Architecture.__dataclass_fields__:
        ours, theirs = getattr(arch, name), getattr(served, name)
        if ours != theirs:
            raise ServerError(f"{info.url}: serves {info.model_path} with {name}={theirs!r}, the policy has {ours!r}")
