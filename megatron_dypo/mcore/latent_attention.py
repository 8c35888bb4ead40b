"""Multi-head latent attention of torch's modules: Megatron's, with down-projections that every tensor-parallel rank
holds whole, as in Transformer Engine's layers.

Megatron's local layers split the down-projections over the ranks and gather their outputs. Their parameters would then
have other shapes than Transformer Engine's, and each checkpoint, refit and gradient two layouts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_dypo.mcore.compat.latent_attention import LatentAttentionAsGiven
from megatron_dypo.parallel.device import device


class WholeLinear(torch.nn.Module):
    """A linear layer without bias whose weight is whole on every tensor-parallel rank: [T, 1, in] → [T, 1, out].

    Under sequence parallelism a rank sees its part of the tokens, so that Megatron sums the ranks' gradients. Without
    it every rank sees all tokens, which suits one tensor-parallel rank alone: ``layout_rules`` allows no others.
    """

    def __init__(self, in_features: int, out_features: int, config: Any, tp_group: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(out_features, in_features, dtype=config.params_dtype, device=device())
        )
        self.weight.allreduce = True  # type: ignore[attr-defined]
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._tp_group = tp_group

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return F.linear(hidden, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the weight as one that all ranks hold; see Megatron's modules."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self._tp_group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets, **groups)
        return sharded

    def get_extra_state(self) -> None:
        """Return no state. The key is in checkpoints, since Transformer Engine's layers have one."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore the state."""


class WholeLatentAttention(LatentAttentionAsGiven):
    """See the module's docstring."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        group, width = self.pg_collection.tp, config.hidden_size
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(width, config.q_lora_rank, config, group)
        self.linear_kv_down_proj = WholeLinear(width, config.kv_lora_rank + config.qk_pos_emb_head_dim, config, group)
