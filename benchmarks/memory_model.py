"""Compare the memory model of ``megatron-dypo plan`` with the live tensors of real updates.

    python benchmarks/memory_model.py

Each case builds the model, the optimizer and the microbatches as a run does, and makes two updates. On each rank it
counts the bytes of every live tensor storage (``live_bytes.py``): parameters, gradients, optimizer state, and the peak
of all other tensors (activations, the loss's scratch, buffers, the microbatches). The memory model
(``planning/memory.py``) predicts the same bytes for the rank's stage. Ranks are processes over gloo. Memory that
kernels allocate inside is not counted.

Every token but one of a sequence is a response token. The last line is one JSON object, the largest error of each part.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measure

PARTS = ("parameters", "gradients", "optimizer", "activations", "peak")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    name: str
    dtype: str = "float32"
    recompute: str = "none"
    parallel: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    distributed: bool = False
    family: str = "qwen3"
    hidden: int = 256
    layers: int = 4
    ffn: int = 768
    vocab: int = 1024
    kv_heads: int = 2
    experts: int = 0
    """Number of experts, of which a token uses 2; 0: the model is dense."""
    row: int = 1024
    """Tokens of a microbatch."""
    sequences: int = 4
    """Sequences in a microbatch, all of one length."""
    rows: int = 1
    """Microbatches on each replica."""


SP2 = {"tensor": 2, "sequence": True}
CASES = (
    Case(name="fp32"),
    Case(name="bf16", dtype="bfloat16"),
    Case(name="fp32, selective", recompute="selective"),
    Case(name="bf16, selective", recompute="selective", dtype="bfloat16"),
    Case(name="bf16, full", recompute="full", dtype="bfloat16", layers=8),
    Case(name="fp32, llama, vocabulary of 16k", family="llama", vocab=16_384, kv_heads=4, layers=2),
    Case(name="bf16, qwen2, wide", family="qwen2", dtype="bfloat16", hidden=512, ffn=2048, kv_heads=2, row=2048),
    Case(name="bf16, DP2, distributed optimizer", dtype="bfloat16", ranks=2, distributed=True),
    Case(name="fp32, DP2, distributed optimizer", ranks=2, distributed=True),
    Case(name="fp32, TP2", ranks=2, parallel={"tensor": 2}),
    Case(name="bf16, TP2, SP", dtype="bfloat16", ranks=2, parallel={"tensor": 2, "sequence": True}),
    Case(name="bf16, PP2", dtype="bfloat16", ranks=2, parallel={"pipeline": 2}, rows=4),
    Case(name="fp32, PP2, 2 chunks each", ranks=2, parallel={"pipeline": 2, "virtual_pipeline": 2}, layers=8, rows=4),
    Case(name="bf16, experts", dtype="bfloat16", family="qwen3_moe", experts=8, ffn=256),
    Case(name="bf16, latent attention", dtype="bfloat16", family="deepseek_v3", experts=8, ffn=256),
    Case(name="fp32, latent attention", family="deepseek_v3", experts=8, ffn=256),
    Case(name="fp32, latent attention, TP2, SP", family="deepseek_v3", experts=8, ffn=256, ranks=2, parallel=SP2),
    Case(name="bf16, shared experts", dtype="bfloat16", family="glm4_moe", experts=8, ffn=256),
    Case(name="fp32, shared experts, TP2, SP", family="glm4_moe", experts=8, ffn=256, ranks=2, parallel=SP2),
    Case(name="bf16, gpt-oss", dtype="bfloat16", family="gpt_oss", experts=8, ffn=256),
    Case(name="fp32, gpt-oss, TP2, SP", family="gpt_oss", experts=8, ffn=256, ranks=2, parallel=SP2),
    Case(name="fp32, experts, EP2", family="qwen3_moe", experts=8, ffn=256, ranks=2, parallel={"expert": 2}),
)


def compare(case: Case) -> dict[str, float]:
    """Print the measured and the modelled bytes of each rank; return the largest relative error of each part."""
    answers = measure.run_ranks(str(Path(__file__)), ["--measure", json.dumps(asdict(case))], ranks=case.ranks)
    worst = dict.fromkeys(PARTS, 0.0)
    print(f"\n{case.name}: MiB measured, modelled, error")
    for rank, (measured, modelled) in enumerate(answers):
        errors = {part: modelled[part] / measured[part] - 1 for part in PARTS}
        print(
            f"  rank {rank}  "
            + "   ".join(
                f"{part} {measured[part] / 2**20:.1f} {modelled[part] / 2**20:.1f} {errors[part]:+.1%}"
                for part in PARTS
            ),
            flush=True,
        )
        worst = {part: max(worst[part], abs(errors[part])) for part in PARTS}
    return worst


def main() -> None:
    names = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=list(names))
    parser.add_argument("--smoke", action="store_true", help="the first case alone: does it run?")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        import memory_model_ranks

        memory_model_ranks.answer(Case(**json.loads(args.measure)))
        return
    measure.print_header()
    errors = [compare(names[name]) for name in (args.cases[:1] if args.smoke else args.cases)]
    measure.print_result({part: round(max(error[part] for error in errors), 4) for part in PARTS})


if __name__ == "__main__":
    main()
