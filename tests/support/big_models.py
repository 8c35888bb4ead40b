"""Models and layouts for the bars of planning. As a program: measure the cost of planning for one of them.

``python -m tests.support.big_models NAME QUANTIZATION`` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import cast

from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.refit_plan import RefitPlan, make_plan
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from megatron_dypo.refit.plan.summary import summarize

LLAMA_3_70B = {
    "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_235B_A22B = {
    "model_type": "qwen3_moe", "num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
}  # fmt: skip

# Four stages do not divide 94 layers: embedding and output layer count as one each.
CASES: dict[str, tuple[dict[str, object], Mesh, ServerMesh]] = {
    "llama-3-70b": (LLAMA_3_70B, Mesh(tensor=8, pipeline=4), ServerMesh(tensor=8)),
    "qwen3-235b-a22b": (
        QWEN3_235B_A22B,
        Mesh(tensor=8, pipeline=4, expert=8, first_stage_layers=23, last_stage_layers=23),
        ServerMesh(tensor=8),
    ),
    "qwen3-235b-a22b-ep8": (
        QWEN3_235B_A22B,
        Mesh(tensor=8, pipeline=4, expert=8, first_stage_layers=23, last_stage_layers=23),
        ServerMesh(tensor=8, expert=8),
    ),
}
SERVERS = 8


def architecture(name: str) -> Architecture:
    return architecture_from_hf(CASES[name][0], where=name)


def plan(name: str, quantization: Quantization = "none") -> RefitPlan:
    _, source, server = CASES[name]
    return make_plan(architecture(name), source, [server] * SERVERS, quantization=quantization)


def peak_bytes() -> int:
    """Return this program's peak resident memory; ``ru_maxrss`` would count that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main(name: str, quantization: Quantization) -> None:
    start = time.process_time()
    made = plan(name, quantization)
    summary = summarize(made, 50e9)
    planned = time.process_time()
    num_sent = len(made.sends(9))
    sent = time.process_time()
    num_received = len(made.receives(SERVERS - 1, 7))
    received = time.process_time()
    report = {
        "plan_s": planned - start,
        "sends_s": sent - planned,
        "receives_s": received - sent,
        "sends": num_sent,
        "receives": num_received,
        "total_bytes": sum(summary.links.values()),
        "limit_s": summary.limit_s,
        "predicted_s": summary.predicted_s,
        "max_rss_bytes": peak_bytes(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    _, size, kind = sys.argv
    main(size, cast("Quantization", kind))
