"""The section ``refit`` of the configuration: how new weights reach the servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require, require_positive
from megatron_dypo.config.rollout import MAX_DEADLINE_S


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """How new weights reach the servers (refit, or weight sync)."""

    transport: Literal["auto", "p2p", "local", "broadcast", "disk"] = "auto"
    """``p2p``: each trainer rank sends each server rank the slices that the server rank needs, over NCCL or (CPUs) TCP.
    ``local``: the same through shared memory, for servers on the trainer's host. Both need servers with this package's
    weight loader; servers that the run starts have it. ``broadcast``: SGLang's distributed update of whole tensors.
    ``disk``: a shared folder. ``auto``: the first of ``local``, ``p2p``, ``broadcast`` that all servers support."""
    verify: Literal["off", "sampled", "full"] = "sampled"
    """How much of the weights to check after ``p2p`` and ``local``, by checksums of the bytes sent and received.
    ``sampled``: a sixteenth, a different one in each version."""
    quantize: Literal["none", "fp8_block", "fp8_channel"] = "none"
    """Quantise linear weights to FP8 e4m3 before ``p2p`` and ``local`` send them, for servers of an FP8 model.
    ``fp8_block``: a scale for each block of 128×128 (DeepSeek's format). ``fp8_channel``: a scale for each row."""
    offload_servers: bool = False
    """Let servers release their memory while the trainer needs it. Only for servers that the run starts on its own
    GPUs, with ``rollout.servers.extra_args: [--enable-memory-saver]``."""
    bucket_mib: int = 512
    """MiB of one broadcast bucket; for ``p2p`` and ``local``, MiB of all staging buffers of a rank together."""
    in_flight: Literal["pause", "abort"] = "pause"
    """Fate of running requests during a refit. ``pause``: they wait, then continue with the new weights. ``abort``:
    they end."""
    deadline_s: float = 600.0
    """A refit that takes longer than this many seconds fails on all ranks. A server that is killed is noticed within
    seconds. A server that hangs uses up half of the time left, and the other servers get the rest: allow twice the time
    of a refit."""

    def __post_init__(self) -> None:
        require_positive(self, "bucket_mib")
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
