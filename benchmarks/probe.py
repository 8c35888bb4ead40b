"""Compare the cost of a probe's scores with that of updates from the same trajectories.

    python benchmarks/probe.py

- ``scores``: n trajectories, each one forward and backward pass and a projection to 4,096 numbers.
- ``updates``: n updates, each from one of these trajectories: forward, token loss, backward, optimizer.
- ``packed``: one update from all n trajectories, packed into two microbatches.

Each is measured on one model in one process, in fp32 with one thread: the quickstart's model, and the main shape of
``step_overhead.py``. Times are medians over rounds, and each round runs every variant once. The memory is the growth of
the resident set during the scores, with 32 and with 256 trajectories, each in a process of its own.

The last line is one JSON object: ``time_vs_updates`` and ``memory_256_vs_32`` are the worst over the shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import overhead_steps
from step_overhead import SMOKE, Shape

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.mcore import features
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.models.gradient_projection import RandomProjection
from megatron_dypo.parallel.groups import MeshRank, close
from megatron_dypo.types import Sample

DIMENSION = 4096
SHAPES = {
    "quickstart": Shape(hidden=128, layers=4, ffn=384, vocab=128, rollouts=24, traces=0, length=40, group_size=8),
    "main": Shape(rollouts=12, traces=0),
}


def scored(bench: overhead_steps.Bench, samples: list[Sample], layout: MeshRank) -> None:
    """Compute the scores of the samples, and keep none of them."""
    from megatron_dypo.mcore.scores import sequence_scores

    projection = RandomProjection(DIMENSION, 0)
    deque(sequence_scores(bench.chunks, samples, projection, arch=bench.arch, layout=layout), maxlen=0)


def updated(bench: overhead_steps.Bench, samples: list[Sample], layout: MeshRank) -> None:
    """Make one update from each sample."""
    for sample in samples:
        bench.rows = overhead_steps.pack_microbatches([sample], 1, bench.arch, layout)
        bench.step("dypo")


def measured(what: str, shape: Shape) -> dict[str, Any]:
    """Make one measurement in this process."""
    features.shield_imports()
    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    bench = overhead_steps.Bench(shape, parallel, layout)
    samples, packed = overhead_steps.token_weights(bench.groups), bench.rows
    kind, _, number = what.partition(":")
    if kind == "memory":
        scored(bench, samples[:2], layout)
        start = measure.resident_bytes()
        measure.reset_peak()
        scored(bench, (samples * int(number))[: int(number)], layout)
        result: dict[str, Any] = {"growth": max(measure.peak_bytes() - start, 1), "held": start}
    else:

        def pack_and_update() -> None:
            bench.rows = packed
            bench.step("dypo")

        variants = {
            "scores": lambda: scored(bench, samples, layout),
            "updates": lambda: updated(bench, samples, layout),
            "packed": pack_and_update,
        }
        measure.interleaved(variants, 1)
        wall, cpu = measure.interleaved(variants, int(number))
        result = {"wall": wall, "cpu": cpu, "trajectories": len(samples)}
    close(layout)
    return result


def compare(name: str, shape: Shape, rounds: int) -> dict[str, float]:
    """Print the measurements of one shape; return its two ratios."""
    script, sizes = str(Path(__file__)), json.dumps(asdict(shape))
    answer = measure.run_ranks(script, ["--measure", f"time:{rounds}", "--shape", sizes])
    seconds = {variant: statistics.median(values) for variant, values in answer["wall"].items()}
    print(f"\n{name}: {answer['trajectories']} trajectories")
    for variant, values in answer["wall"].items():
        print(f"  {variant:8} {seconds[variant]:8.3f} s   by round {[round(value, 3) for value in values]}")
    for variant in ("updates", "packed"):
        print(f"  scores vs {variant}: {seconds['scores'] / seconds[variant]:.3f}")
    peaks = {}
    for count in (32, 256):
        found = measure.run_ranks(script, ["--measure", f"memory:{count}", "--shape", sizes], lean=True)
        peaks[count] = found["held"] + found["growth"]
        print(f"  {count} trajectories: {found['growth'] / 2**20:.1f} MiB on top of {found['held'] / 2**20:.0f}")
    print(f"  memory of 256 vs 32: {peaks[256] / peaks[32]:.3f}", flush=True)
    return {
        "time_vs_updates": seconds["scores"] / seconds["updates"],
        "memory_256_vs_32": peaks[256] / peaks[32],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny shape: does it run?")
    parser.add_argument("--measure", help="one measurement in this process: time:<rounds> or memory:<trajectories>")
    parser.add_argument("--shape", help="shape of that measurement, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, Shape(**json.loads(args.shape)))), flush=True)
        return
    shapes = {"tiny": replace(SHAPES["main"], **SMOKE)} if args.smoke else SHAPES
    measure.print_header()
    found = [compare(name, shape, 1 if args.smoke else args.rounds) for name, shape in shapes.items()]
    measure.print_result({name: round(max(one[name] for one in found), 4) for name in found[0]})


if __name__ == "__main__":
    main()
