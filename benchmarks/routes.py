"""Measure what the routes of a large mixture of experts cost a replica's leader.

    python benchmarks/routes.py

A rollout has 32,768 tokens with 8 experts in each of 94 layers (Qwen3-235B-A22B): 131 MB in the answer of a server.

- ``read``: :func:`read_routes` of one rollout, as the client reads it, into a file without a name.
- ``text``: only the decoding of the base64 of the same answer, which nobody can leave out.
- ``cut``: :func:`cut_routes` of this rollout, packed alone, for each of 64 ranks (8 pipeline stages, 4 tensor-parallel
  ranks with sequence parallelism, 2 context-parallel ranks), as for one pass of the policy.
- ``whole``: one copy of the int32 array that came, for comparison. Without a cut every rank would get such a copy.

Every round is printed: milliseconds of the wall clock and of this process's processor time. Then the routes of many
rollouts are kept at the same time, and the growth of the memory that is not backed by a file is measured.

The last line is one JSON object. ``read_vs_text`` and ``cut_vs_whole`` are ratios of medians of the processor time.
``gib_for_1024`` is the memory that 1,024 such rollouts would take without the pages that the system can drop.
``share_of_step``: processor time of ``read`` and two ``cut`` for a token, divided by the time of a published step for a
token of one leader: 395 s for 512 sequences of 5,698 tokens on 4 replicas (NeMo-RL, Qwen3-235B-A22B, 128 H100).
"""

from __future__ import annotations

import argparse
import base64
import statistics
from pathlib import Path
from typing import Any

import measure
import numpy as np

from megatron_dypo.batching.pack import pack, sequence_alignment
from megatron_dypo.batching.routes import Share, cut_routes
from megatron_dypo.rollout.routes import RouteShape, read_routes
from megatron_dypo.types import Sample, SampleKind, Treatment

SHAPE = RouteShape(num_layers=94, per_token=8, num_experts=128)
PIPELINE, TENSOR, CONTEXT = 8, 4, 2
US_PER_TOKEN = 395e6 * 4 / (512 * 5698)


def make_answer(tokens: int) -> str:
    experts = np.random.default_rng(0).integers(0, SHAPE.num_experts, (tokens - 1, SHAPE.num_layers, SHAPE.per_token))
    return base64.b64encode(experts.astype("<i4").tobytes()).decode()


def make_shares() -> list[Share]:
    """Return the shares of all ranks of a replica; the first stages have one layer more than the last."""
    ends = np.cumsum([0, *(SHAPE.num_layers // PIPELINE + (s < SHAPE.num_layers % PIPELINE) for s in range(PIPELINE))])
    return [
        Share(rank=0, cp_rank=cp_rank, part=part, parts=TENSOR, layers=tuple(range(ends[stage], ends[stage + 1])))
        for stage in range(PIPELINE)
        for cp_rank in range(CONTEXT)
        for part in range(TENSOR)
    ]


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def growth(answer: str, tokens: int, count: int) -> float:
    """Return the bytes of memory that the routes of one rollout take, while those of ``count`` are kept."""
    read_routes([answer], [tokens], SHAPE)
    before = anonymous_bytes()
    kept = [read_routes([answer], [tokens], SHAPE) for _ in range(count)]
    return max(anonymous_bytes() - before, 0) / len(kept)


def measured(tokens: int, count: int, rounds: int) -> dict[str, float]:
    answer, shares = make_answer(tokens), make_shares()
    (routes,) = read_routes([answer], [tokens], SHAPE)
    sample = Sample(
        order=0,
        member=0,
        treatment=Treatment.REINFORCE,
        kind=SampleKind.ROLLOUT,
        tokens=np.zeros(tokens, np.int32),
        num_prompt_tokens=1,
        policy_version=0,
        routes=routes,
    )
    whole = pack([sample], [0], tokens, sequence_alignment(CONTEXT), ())
    came = np.frombuffer(base64.b64decode(answer), "<i4")
    variants: dict[str, Any] = {
        "read": lambda: read_routes([answer], [tokens], SHAPE),
        "text": lambda: base64.b64decode(answer, validate=True),
        "cut": lambda: [cut_routes(whole, [sample], share, SHAPE, CONTEXT) for share in shares],
        "whole": came.copy,
    }
    wall, cpu = measure.interleaved(variants, rounds)
    for name in variants:
        shown = ", ".join(f"{1e3 * a:.0f} ({1e3 * b:.0f})" for a, b in zip(wall[name], cpu[name], strict=True))
        print(f"{name:>7}: {shown} ms", flush=True)
    median = {name: statistics.median(values) for name, values in cpu.items()}
    us = 1e6 * (median["read"] + 2 * median["cut"]) / tokens
    each = growth(answer, tokens, count)
    print(f"# {count} rollouts kept: {each / 2**20:.2f} MiB of memory each; {us:.1f} us of processor time a token")
    return {
        "read_vs_text": round(median["read"] / median["text"], 2),
        "cut_vs_whole": round(median["cut"] / median["whole"], 2),
        "gib_for_1024": round(1024 * each / 2**30, 2),
        "share_of_step": round(us / US_PER_TOKEN, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    measure.print_header()
    tokens, count = (256, 2) if options.smoke else (32_768, 64)
    measure.print_result(measured(tokens, count, 2 if options.smoke else options.rounds))


if __name__ == "__main__":
    main()
