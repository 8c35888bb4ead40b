"""Biases of experts that are built one after the other.

Megatron adds them in place (transformer/mlp.py:247 of 0.16.1) to the output of a function of its own, which autograd
forbids where that function returned its input: without tensor and expert parallelism
(tensor_parallel/mappings.py:240). Cores up to 0.19 are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP


def copy_expert_outputs(chunk: torch.nn.Module) -> None:
    """Let Megatron add the biases to a copy of each expert's output."""
    for module in chunk.modules():
        if isinstance(module, SequentialMLP):
            for expert in module.local_experts:
                if expert.linear_fc2.bias is not None:
                    expert.linear_fc2.register_forward_hook(_copy)


def _copy(module: Any, inputs: Any, outputs: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    return outputs[0].clone(), outputs[1]
