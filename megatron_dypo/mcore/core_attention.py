"""``core_attention`` of a layer spec without Transformer Engine, and of every spec with attention sinks.

Transformer Engine's attention takes sinks over packed sequences only in its newest versions, and over context-parallel
ranks in one of its ways alone.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from megatron_dypo.mcore.attention import attend, plan
from megatron_dypo.mcore.context_attention import attend_over_context
from megatron_dypo.mcore.sink_attention import Sinks
from megatron_dypo.parallel.device import device


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
        self._tp_group = pg_collection.tp
        is_windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self._window = config.window_size[0] + 1 if is_windowed else None
        assert self._window is None or config.softmax_type == "learnable", "a window needs sinks"
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            num_heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(num_heads, dtype=config.params_dtype, device=device()))
            # Megatron and Transformer Engine leave the mark out; the gradient's norm would lack the other ranks' heads.
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)
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
        sinks = None if self.softmax_offset is None else Sinks(self.softmax_offset, self._window)
        if self._cp_group is not None:
            return attend_over_context(query, key, value, cu_seqlens, self._cp_group, self.scale, sinks)
        return attend(query, key, value, plan(cu_seqlens, query.device), self.scale, sinks)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sinks as Megatron's own attention stores them; see Megatron's modules."""
        if self.softmax_offset is None:
            return {}
        assert metadata is not None, "Megatron's checkpoints name their groups"
        groups = {"tp_group": self._tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"softmax_offset": 0}, sharded_offsets, **groups
        )
        return sharded
