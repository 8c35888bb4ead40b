"""A rank that takes its CPU for a GPU without Transformer Engine."""

from __future__ import annotations

import torch

from megatron_dypo.mcore import features
from megatron_dypo.mcore.compat import cpu
from megatron_dypo.parallel import device


def take_cpu_for_gpu() -> None:
    """Let this process train as on a GPU. The CPU patches stand in for CUDA, and gloo for NCCL."""
    features.shield_imports()
    cpu.install()
    device.on_gpu = lambda: True
    device.device = lambda: torch.device("cpu")
    device.backend = lambda: "gloo"
    device.bind = lambda: None
    device.compute_capability = lambda: (9, 0)
