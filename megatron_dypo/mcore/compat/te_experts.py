"""A patch of Megatron's experts of Transformer Engine, without which an FP8 run cannot save a checkpoint."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_dypo.mcore.compat.private_name import PrivateName

SPLIT_STATE = PrivateName(
    package="megatron-core",
    module="megatron.core.extensions.transformer_engine",
    name="TEGroupedLinear._split_extra_state",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/extensions/transformer_engine.py:1697",
    oldest="0.12",
    takes=("state",),
    needs_te=True,
)
"""Cuts the state of all experts of a layer into one state for each expert."""


@functools.cache
def patch_te_experts() -> None:
    """Let experts have an empty state in FP8; a second call does nothing.

    Since 2.16.1 Transformer Engine stores no state for recipes that keep none between steps, all but ``delayed``. Up to
    0.17 Megatron expects one under FP8, and raises TypeError when a checkpoint is saved.
    """
    upstream = SPLIT_STATE.get()
    from megatron.core.extensions.transformer_engine import TEGroupedLinear

    def split(self: Any, state: Any) -> Any:
        if isinstance(state, torch.Tensor) and state.numel() == 0:
            return [state] * self.num_gemms
        return upstream(self, state)

    TEGroupedLinear._split_extra_state = split
