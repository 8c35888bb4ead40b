"""Qwen3-MoE: Qwen3 with a router and experts instead of the MLP.

Each expert has a name with its global index, as in Megatron's ``SequentialMLP`` (with local indices there). Experts are
split over expert-tensor ranks, independently of the tensor parallelism of other parameters.
"""

from __future__ import annotations

from megatron_dypo.models.families import llama, qwen3
from megatron_dypo.models.families.table import Row, expert_input, expert_output, router
from megatron_dypo.models.rules import Copy, GateUp, RowParallel

_MCORE, _HF = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
_EXPERT, _HF_EXPERT = _MCORE + "experts.local_experts.{expert}.", _HF + "experts.{expert}."

EXPERTS = (
    Row(_MCORE + "router.weight", (_HF + "gate.weight",), Copy(router)),
    Row(
        _EXPERT + "linear_fc1.weight",
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
        GateUp(expert_input),
    ),
    Row(_EXPERT + "linear_fc2.weight", (_HF_EXPERT + "down_proj.weight",), RowParallel(expert_output)),
)
"""The router and the experts."""

ROWS = (*llama.COMMON, *qwen3.HEAD_NORMS, *EXPERTS)
