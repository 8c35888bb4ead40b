"""The part of the configuration tree that says how new weights reach the servers; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require, require_positive
from megatron_dypo.config.rollout import MAX_DEADLINE_S


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """How new weights reach the servers."""

    transport: Literal["auto", "p2p", "local", "broadcast", "disk"] = "auto"
    """``p2p``: each rank sends each server's ranks the slices that they need, over gloo or NCCL. ``local``: the same
    through shared memory, for servers on the trainer's host. Both need servers with our loader, as those that the run
    starts. ``broadcast``: SGLang's distributed update of whole tensors. ``disk``: a shared folder. ``auto``: the first
    of ``local``, ``p2p``, ``broadcast`` that all servers support."""
    verify: Literal["off", "sampled", "full"] = "sampled"
    """Compare checksums of what was sent and received by ``p2p`` and ``local``: of nothing, of a sixteenth (others in
    each version), of all."""
    quantize: Literal["none", "fp8_block", "fp8_channel"] = "none"
    """What ``p2p`` and ``local`` make of linear weights before they send them, for servers of such a model: FP8 e4m3
    with a scale for each block of 128×128 (DeepSeek's format) or for each row."""
    release_memory: bool = False
    """Let servers give their memory back while the trainer needs it, for servers that the run starts on its own GPUs
    (``rollout.servers.extra_args: [--enable-memory-saver]``)."""
    bucket_mb: int = 512
    """Size of one broadcast bucket; of all staging buffers of a rank together, for ``p2p`` and ``local``."""
    in_flight: Literal["pause", "abort"] = "pause"
    """What a refit does to running requests."""
    deadline_s: float = 600.0
    """A refit that takes longer fails on all ranks. A server that is killed is found at once; one that hangs costs half of
    the time that is left, and the other half is for the refit to the rest: allow twice what a refit takes."""

    def __post_init__(self) -> None:
        require_positive(self, "bucket_mb")
        require(
            0 < self.deadline_s <= MAX_DEADLINE_S,
            f"deadline_s={self.deadline_s}",
            f"must be above 0 and at most {MAX_DEADLINE_S:g} seconds",
        )
        require(
            self.quantize == "none" or self.transport not in ("broadcast", "disk"),
            f"quantize={self.quantize}",
            f"needs transport auto, p2p or local, got {self.transport}",
        )
