"""Compare the cost of a probe, but for its rollouts, with that of updates from the same trajectories.

    python benchmarks/probe.py

- ``probe``: ``megatron_dypo.loop.probe.measure`` on n trajectories, six rollouts and two traces of each prompt. It is
  all that a probe does after its rollouts: for each trajectory a forward and a backward pass and a projection to 4,096
  numbers, log π_ref of all, the estimates with their intervals, and both files.
- ``updates``: n updates, each from one of these trajectories: forward, token loss, backward, optimizer.

Both are measured on one model in one process, in fp32 with one thread: the quickstart's model, and the main shape of
``step_overhead.py``. Each round runs both once. Times are medians over rounds, of the wall clock and of the processor;
the ratio on the last line is that of the processor's, which other load changes less.

Memory is measured with 16 and with 128 trajectories, each in a process of its own. On a GPU there are two kinds of it:

- Device memory, which is flat in n: model, gradients, optimizer, activations and projections. It is the resident set's
  growth since before the model was built, at its peak during the passes, without the n × 4,096 scores, which a GPU does
  not hold.
- Host memory, which grows with n: the scores and what is computed from them, as ``tracemalloc`` counts NumPy's arrays
  during the whole ``measure``, with 65,536 numbers a score. ``host_vs_plan`` is that of 128 trajectories, divided by
  ``megatron-dypo plan``'s.

The last line is one JSON object: ``time_vs_updates`` and ``device_memory_128_vs_16`` are the worst over the shapes.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import overhead_steps
import probe_parts
from step_overhead import SMOKE, Shape

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.mcore import features
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.parallel.groups import MeshRank, close

SHAPES = {
    "quickstart": Shape(hidden=128, layers=4, ffn=384, vocab=128, length=40),
    "main": Shape(),
}
TRAJECTORIES = {"quickstart": 128, "main": 24, "tiny": 24}
"""Trajectories whose probe is timed, by shape."""
FEW, MANY = 16, 128
DIMENSION, HOST_DIMENSION = 4096, 2**16
"""Numbers of a score. Host memory is measured with more, so that the scores outweigh everything else."""
MIB = 2**20


def measured(what: str, shape: Shape) -> dict[str, Any]:
    """Make one measurement in this process: ``time:<trajectories>:<rounds>``, or ``device`` or ``host:<number>``."""
    features.shield_imports()
    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    kind, count, *rounds = what.split(":")
    with tempfile.TemporaryDirectory() as folder:
        size = HOST_DIMENSION if kind == "host" else DIMENSION
        parts = functools.partial(probe_parts.Parts, shape, int(count), size, parallel, layout, Path(folder))
        if kind == "time":
            result = _time(parts(), layout, int(rounds[0]))
        else:
            result = _device_memory(parts) if kind == "device" else _host_memory(parts())
    close(layout)
    return result


def _time(parts: probe_parts.Parts, layout: MeshRank, rounds: int) -> dict[str, Any]:
    bench, samples = parts.bench, parts.weighted()
    alone = [overhead_steps.pack_microbatches([sample], 1, bench.arch, layout) for sample in samples]

    def updates() -> None:
        for bench.rows in alone:
            bench.step("dypo")

    parts.probe()
    bench.step("dypo")
    wall, cpu = measure.interleaved({"probe": parts.probe, "updates": updates}, rounds)
    return {"wall": wall, "cpu": cpu, "cost": parts.cost()}


def _device_memory(make: functools.partial[probe_parts.Parts]) -> dict[str, int]:
    probe_parts.import_all()
    start = measure.resident_bytes()
    parts = make()
    parts.bench.step("dypo")  # the optimizer's state
    parts.scores(parts.groups[:1])
    held = measure.resident_bytes()
    measure.reset_peak()
    scores = parts.scores(parts.groups)
    return {"held": held - start, "growth": measure.peak_bytes() - held - scores.score_Nd.nbytes}


def _host_memory(parts: probe_parts.Parts) -> dict[str, float]:
    probe_parts.import_all()
    parts.scores(parts.groups[:1])
    tracemalloc.start()
    parts.probe()
    return {"peak": tracemalloc.get_traced_memory()[1], "scores": parts.score_bytes, "planned": parts.planned_bytes}


def compare_time(name: str, shape: Shape, rounds: int) -> float:
    """Print the times of one shape; return the ratio of a probe to updates."""
    answer = ask(f"time:{TRAJECTORIES[name]}:{rounds}", shape)
    print(f"\n{name}: {TRAJECTORIES[name]} trajectories")
    ratios = {}
    for clock, words in (("wall", "wall clock"), ("cpu", "processor")):
        medians = {variant: statistics.median(values) for variant, values in answer[clock].items()}
        for variant, values in answer[clock].items():
            rounds_of = [round(value, 3) for value in values]
            print(f"  {variant:8} {medians[variant]:8.3f} s of the {words}   by round {rounds_of}")
        ratios[clock] = medians["probe"] / medians["updates"]
        print(f"  probe vs updates: {ratios[clock]:.3f}")
    cost = answer["cost"]
    print(f"  last probe: passes {cost['score_seconds']:.3f} s, estimates {cost['estimate_seconds']:.3f} s", flush=True)
    return float(ratios["cpu"])


def compare_device_memory(shape: Shape) -> float:
    """Print the device memory with few and with many trajectories; return the ratio."""
    peaks = []
    for count in (FEW, MANY):
        found = ask(f"device:{count}", shape)
        peaks.append(found["held"] + found["growth"])
        print(f"  device memory, {count} trajectories: {found['growth'] / MIB:.1f} MiB on top of ", end="")
        print(f"{found['held'] / MIB:.0f}")
    print(f"  device memory of {MANY} vs {FEW}: {peaks[1] / peaks[0]:.3f}", flush=True)
    return float(peaks[1] / peaks[0])


def compare_host_memory(shape: Shape) -> float:
    """Print the host memory, which is that of any model; return the quotient of the measured and the planned one."""
    few, many = (ask(f"host:{count}", shape) for count in (FEW, MANY))
    print()
    for count, found in ((FEW, few), (MANY, many)):
        peak, planned, scores = (found[name] / MIB for name in ("peak", "planned", "scores"))
        print(f"host memory, {count} trajectories: {peak:.2f} MiB, planned {planned:.2f}, scores {scores:.2f}")
    grown, each = ((many[name] - few[name]) / (MANY - FEW) for name in ("peak", "scores"))
    print(f"host memory of one more trajectory: {grown:,.0f} bytes, of which its score has {each:,.0f}")
    return float(many["peak"] / many["planned"])


def ask(what: str, shape: Shape) -> dict[str, Any]:
    """Make one measurement in a process of its own."""
    arguments = ["--measure", what, "--shape", json.dumps(asdict(shape))]
    found: dict[str, Any] = measure.run_ranks(str(Path(__file__)), arguments, lean=not what.startswith("time"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny shape: does it run?")
    parser.add_argument("--measure", help="one measurement in this process, such as device:32")
    parser.add_argument("--shape", help="shape of that measurement, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, Shape(**json.loads(args.shape)))), flush=True)
        return
    shapes = {"tiny": replace(SHAPES["main"], **SMOKE)} if args.smoke else SHAPES
    measure.print_header()
    times, memories = [], []
    for name, shape in shapes.items():
        times.append(compare_time(name, shape, 1 if args.smoke else args.rounds))
        memories.append(compare_device_memory(shape))
    host = compare_host_memory(next(iter(shapes.values())))
    result = {"time_vs_updates": max(times), "device_memory_128_vs_16": max(memories), "host_vs_plan": host}
    measure.print_result({name: round(value, 4) for name, value in result.items()})


if __name__ == "__main__":
    main()
