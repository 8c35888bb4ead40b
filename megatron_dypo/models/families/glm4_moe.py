"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and others of their type: attention as in Qwen2 and Qwen3; after some dense layers, the
experts of DeepSeek-V3 with its biased router, beside an MLP that every token passes.

Biases of queries, keys and values, and norms of each query and key head, are there if the config asks for them.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.families import deepseek_v3, llama, qwen2, qwen3
from megatron_dypo.models.families.table import Row

_OTHERS = (*llama.COMMON, *(replace(row, layers="dense") for row in llama.MLP), *deepseek_v3.EXPERTS)
_BIASES = tuple(row for row in qwen2.ROWS if row.mcore.endswith(".bias"))

ROWS = (*_OTHERS, *_BIASES, *qwen3.HEAD_NORMS)
"""With ``attention_bias`` and ``use_qk_norm``, as in GLM-4.5."""


def rows_of(arch: Architecture) -> tuple[Row, ...]:
    """Return the rows of an architecture, with those of its switches alone."""
    return (*_OTHERS, *(_BIASES if arch.qkv_bias else ()), *(qwen3.HEAD_NORMS if arch.qk_norm else ()))
