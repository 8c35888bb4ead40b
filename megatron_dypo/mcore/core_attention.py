"""``core_attention`` of a layer spec without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from megatron_dypo.mcore.attention import attend, plan
from megatron_dypo.mcore.context_attention import attend_over_context


class PackedAttention(MegatronModule):
    """Attention for packed microbatches and context parallelism, both of which Megatron's own refuses.

    T are the tokens of this rank.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self._cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend: [T, h, d] × [T, g, d] × [T, g, e] → [T, h·e]; the mask is always causal within a sequence.

        With context parallelism T is this rank's zig-zag part of the microbatch that ``packed_seq_params`` describes.
        """
        assert packed_seq_params is not None, "microbatches are always packed here"
        cu_seqlens = tuple(packed_seq_params.cu_seqlens_q.tolist())
        if self._cp_group is not None:
            return attend_over_context(query, key, value, cu_seqlens, self._cp_group, self.scale)
        return attend(query, key, value, plan(cu_seqlens, query.device), self.scale)
