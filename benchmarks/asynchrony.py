"""Compare the step time of an asynchronous run with that of a synchronous run of the quickstart.

    python benchmarks/asynchrony.py

Both runs make the same updates and begin with the quickstart's warm start, which is made first if it does not exist.
They take turns, a block of steps each, so that a change of the machine's load affects both; every block resumes from
the checkpoint of the run's last block. The time of a step is ``timing_s/step`` of the metrics, its share of the wall
clock. The first step of each block is left out: nothing was collected ahead for it. Held-out accuracy is printed with
its 95% interval (Wilson).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

import measure as measuring

from megatron_dypo.metrics.intervals import wilson_interval
from megatron_dypo.metrics.records import read_metrics

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
VARIANTS = {"sync": [], "async": ["rollout.mode=async", "objective.importance.cap=2.0"]}


def run(*command: str) -> None:
    print("$ " + " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def make_warm_start(folder: Path, *, smoke: bool) -> None:
    """Run the quickstart up to the first steps of its DYPO run, which are not used; ``smoke``: make only a model."""
    if (folder / "warmup" / "hf" / "config.json").is_file():
        return
    if not smoke:
        steps = ["run.steps=2", "optimizer.warmup_steps=0", "eval.max_prompts=8"]
        run(str(QUICKSTART / "run.py"), "--out", str(folder), *steps)
        return
    sys.path.insert(0, str(QUICKSTART))
    from run import make_inputs

    make_inputs(folder, seed=1)
    (folder / "warmup").mkdir(exist_ok=True)
    (folder / "model").rename(folder / "warmup" / "hf")


def train_block(folder: Path, name: str, steps: int, *more: str) -> None:
    """Train a variant until its run has ``steps`` steps."""
    run(
        *["-m", "megatron_dypo.cli", "train", str(QUICKSTART / "dypo.yaml")],
        *[f"run.dir={folder / name}", f"run.steps={steps}", "checkpoint.every=0", "export.hf=false"],
        *[f"model.hf_path={folder}/warmup/hf", f"data.prompts=[{folder}/data/train.jsonl]"],
        *[f"eval.sets.heldout.path={folder}/data/heldout.jsonl", *VARIANTS[name], *more],
    )


def measure(folder: Path, name: str, block: int) -> dict[str, float]:
    """Return the figures of a variant, from its metrics."""
    rows = {int(row["step"]): row for row in read_metrics(folder / name / "metrics.jsonl")}
    steps = [step for step in sorted(rows) if "timing_s/step" in rows[step] and step % block != 1]
    accuracy = rows[max(rows)]["eval/heldout/accuracy"]
    low, high = wilson_interval(accuracy, int(rows[max(rows)]["eval/heldout/num_samples"]))
    # A step that learns from queued groups has no rollouts of its own.
    versions = {step: rows[step].get("rollout/policy_version") for step in steps}
    ages = [step - 1 - version for step, version in versions.items() if version is not None]
    found = {
        "seconds": median(rows[step]["timing_s/step"] for step in steps),
        "mean_seconds": fmean(rows[step]["timing_s/step"] for step in steps),
        "waiting": fmean(rows[step].get("timing_s/gen", 0.0) for step in steps),
        "age": fmean(ages) if ages else math.nan,
        "accuracy": accuracy,
        "low": low,
        "high": high,
    }
    blocks = [
        [rows[step]["timing_s/step"] for step in steps if (step - 1) // block == b] for b in range(max(rows) // block)
    ]
    print(f"{name:6s}  seconds of each step, block by block: {[[round(s, 2) for s in steps] for steps in blocks]}")
    print(f"{name:6s}" + "".join(f"  {key} {value:.3f}" for key, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/asynchrony"), help="folder for data, models and runs")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="two blocks of two steps, no warm start: does it run?")
    args = parser.parse_args()
    args.out = args.out.resolve()  # the commands run in the repository, this program in any folder
    measuring.print_header()
    smoke = (
        [
            "optimizer.warmup_steps=0",
            "rollout.prompts_per_round=4",
            "batching.prompts_per_update=4",
            "eval.max_prompts=4",
        ]
        if args.smoke
        else []
    )
    if args.smoke:
        args.steps, args.blocks = 4, 2
    make_warm_start(args.out, smoke=args.smoke)
    block = args.steps // args.blocks
    for number in range(1, args.blocks + 1):
        for name in reversed(list(VARIANTS)) if number % 2 else VARIANTS:
            train_block(args.out, name, number * block, *smoke)
    sync, asynchronous = (measure(args.out, name, block) for name in VARIANTS)
    ratios = {
        "step_time_vs_sync": round(asynchronous["seconds"] / sync["seconds"], 4),
        "accuracy": asynchronous["accuracy"],
        "accuracy_of_sync": sync["accuracy"],
        "intervals_overlap": asynchronous["high"] >= sync["low"] and sync["high"] >= asynchronous["low"],
    }
    measuring.print_result(ratios)


if __name__ == "__main__":
    main()
