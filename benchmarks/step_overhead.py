"""Compare time and peak memory of a DYPO update with Megatron's plain cross-entropy step on the same packed tokens.

    python benchmarks/step_overhead.py

- ``dypo``: SFT, GRPO and GAL in one update: forward, token loss, backward, optimizer. The passes for log π_old before
  it are not included; their time, and that of token weights and packing, is printed separately.
- ``sft``: Megatron-Core's ``GPTModel`` with labels: logits of the whole microbatch, fused vocab-parallel cross-entropy
  (``cross_entropy_loss_fusion``), mean over response tokens; the same parameters, microbatches, schedule and optimizer.
- ``sft_unfused``: the same with Megatron's default cross-entropy, which needs less on a CPU.

Each is measured in one process, and on two tensor-parallel ranks over gloo, in fp32 with one thread for each rank.
Prompts are a quarter of the tokens. The main shape has 4 layers of 256 channels and 32,768 vocabulary entries. Its
output projection has 73% of the parameters that a token is multiplied with (a 7B model: 8%), so the work that DYPO adds
after the last layer counts for more than in a large model.

Times are medians over rounds; each round runs every variant once, in one process and on one model. Processor time is
printed too: other load on the machine changes it less. Peak memory is the growth of the resident set since before the
model was built, with each variant in a process of its own. Parameters, gradients and optimizer state count, as they do
in a GPU's ``max_memory_allocated``; ``step`` is the memory on top of them.

``memory_k64_vs_k4`` compares groups of 64 rollouts with groups of 4; the sequences are otherwise the same.

The last line is one JSON object. Each of its ratios is relative to the better of ``sft`` and ``sft_unfused``, and is
the worst over one process and TP2 on the main shape (or on all shapes, if the main shape was not asked for).
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measure
import overhead_steps

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.models.layout_rules import check_layout


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden: int = 256
    layers: int = 4
    ffn: int = 768
    vocab: int = 32_768
    rollouts: int = 12
    traces: int = 4
    group_size: int = 4
    length: int = 256
    """Median tokens of a sequence."""
    prompt_share: float = 0.25
    rows: int = 2


SHAPES = {
    "main": Shape(),
    "no prompts": Shape(prompt_share=0.01),
    "deeper": Shape(hidden=384, layers=12, ffn=1152, length=128),
    "152k vocabulary": Shape(vocab=151_936, length=128),
    "tiny vocabulary": Shape(vocab=1_024),
}
K_SHAPE = Shape(rollouts=64, traces=16, length=48)
SMOKE = {"hidden": 128, "layers": 2, "ffn": 64, "vocab": 500, "length": 16}
"""Sizes that ``--smoke`` gives every shape."""


def ask(what: str, shape: Shape, ranks: int, args: argparse.Namespace) -> Any:
    """Make one measurement in processes of its own."""
    arguments = ["--measure", what, "--shape", json.dumps(asdict(shape)), "--rounds", str(args.rounds)]
    return measure.run_ranks(str(Path(__file__)), arguments, ranks=ranks, lean=what.startswith("memory"))


def compare_time(name: str, shape: Shape, ranks: int, args: argparse.Namespace) -> float:
    answer = ask("time", shape, ranks, args)
    medians = {variant: statistics.median(values) for variant, values in answer["wall"].items()}
    cpu = {variant: statistics.median(values) for variant, values in answer["cpu"].items()}
    ratios = {variant: medians["dypo"] / medians[variant] for variant in ("sft", "sft_unfused")}
    print(f"\n{name}, {ranks} rank(s), {answer['tokens']} tokens in {shape.rows} rows, time")
    for variant, values in answer["wall"].items():
        rounds = [round(value, 2) for value in values]
        print(f"  {variant:12} {medians[variant]:7.3f} s, of the processor {cpu[variant]:7.3f} s   by round {rounds}")
    for variant, ratio in ratios.items():
        print(f"  dypo vs {variant}: {ratio:.3f}, of the processor {cpu['dypo'] / cpu[variant]:.3f}")
    beside = {key: f"{answer[key] / medians['dypo']:.3f}" for key in ("scoring", "weights", "packing")}
    print(f"  beside the update, in updates: {beside}", flush=True)
    return float(max(ratios.values()))


def compare_memory(name: str, shape: Shape, ranks: int, args: argparse.Namespace) -> float:
    answers = {variant: ask(f"memory:{variant}", shape, ranks, args) for variant in overhead_steps.VARIANTS}
    print(f"\n{name}, {ranks} rank(s), peak memory of a rank, MiB")
    for variant, answer in answers.items():
        print(f"  {variant:12} {answer['total'] / 2**20:7.0f}   of which step {answer['step'] / 2**20:7.0f}")
    ratios = {}
    for variant in ("sft", "sft_unfused"):
        ratios[variant], step = (answers["dypo"][part] / answers[variant][part] for part in ("total", "step"))
        print(f"  dypo vs {variant}: {ratios[variant]:.3f}, step {step:.3f}", flush=True)
    return float(max(ratios.values()))


def compare_group_sizes(ranks: int, args: argparse.Namespace) -> float:
    shape = replace(K_SHAPE, **(SMOKE if args.smoke else {}))
    sizes = {k: ask("memory:dypo", replace(shape, group_size=k), ranks, args) for k in (4, 16, 64)}
    print(
        f"\n{K_SHAPE.rollouts} rollouts and {K_SHAPE.traces} traces, {ranks} rank(s), "
        "peak memory of a rank by group size, MiB"
    )
    for k, answer in sizes.items():
        print(f"  k={k:<3} {answer['total'] / 2**20:7.0f}   of which step {answer['step'] / 2**20:7.0f}", flush=True)
    return float(sizes[64]["total"] / sizes[4]["total"])


def check_shapes(names: list[str], ranks: list[int]) -> None:
    """Raise ValueError if a shape cannot be divided over one of the numbers of ranks, before anything is measured."""
    for name, shape in [*((name, SHAPES[name]) for name in names), ("group sizes", K_SHAPE)]:
        for size in ranks:
            try:
                check_layout(overhead_steps.architecture(shape), ParallelConfig(tensor=size))
            except ValueError as error:
                raise ValueError(f"--ranks {size}: shape {name!r}: {error}") from error


def compare(args: argparse.Namespace) -> dict[str, float]:
    result = {"time_vs_sft": 0.0, "memory_vs_sft": 0.0, "memory_k64_vs_k4": 0.0}
    for name in args.shapes:
        for ranks in args.ranks:
            shape = replace(SHAPES[name], **(SMOKE if args.smoke else {}))
            time_ratio = compare_time(name, shape, ranks, args)
            memory_ratio = compare_memory(name, shape, ranks, args)
            if name == "main" or "main" not in args.shapes:
                result["time_vs_sft"] = max(result["time_vs_sft"], time_ratio)
                result["memory_vs_sft"] = max(result["memory_vs_sft"], memory_ratio)
    for ranks in args.ranks:
        result["memory_k64_vs_k4"] = max(result["memory_k64_vs_k4"], compare_group_sizes(ranks, args))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one round of tiny shapes: does it run?")
    parser.add_argument("--measure", help="one measurement in this process: time, or memory:<variant>")
    parser.add_argument("--shape", help="shape of that measurement, as JSON")
    args = parser.parse_args()
    if args.measure:
        overhead_steps.answer(args.measure, Shape(**json.loads(args.shape)), args.rounds)
        return
    check_shapes(args.shapes, args.ranks)
    if args.smoke:
        args.shapes, args.rounds = args.shapes[:1], 1  # one is enough: all get the same tiny sizes
    measure.print_header()
    measure.print_result({name: round(value, 4) for name, value in compare(args).items()})


if __name__ == "__main__":
    main()
