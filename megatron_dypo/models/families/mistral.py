"""Mistral: Llama's tensors under Llama's names. Only its config differs (``head_dim``, ``sliding_window``)."""

from __future__ import annotations

from megatron_dypo.models.families import llama

ROWS = llama.ROWS
