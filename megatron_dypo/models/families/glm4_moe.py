"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and others of their type: attention as in Qwen2 and Qwen3; after some dense layers, the
experts of DeepSeek-V3 with its biased router, beside an MLP that every token passes.

Biases of queries, keys and values, and norms of each query and key head, are there if the config asks for them
(``attention_bias``, ``use_qk_norm``).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_dypo.models.families import deepseek_v3, llama, qwen2, qwen3

ROWS = (
    *llama.COMMON,
    *(replace(row, layers="dense") for row in llama.MLP),
    *deepseek_v3.EXPERTS,
    qwen2.QKV_BIAS,
    *qwen3.HEAD_NORMS,
)
