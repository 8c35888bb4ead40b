"""Measure what verified checkpoints cost a run that saves every 10 steps: in the background, at once, and not at all.

    python benchmarks/saving.py

One rank learns from the quickstart's traces with a model of some 9 million parameters, whose checkpoint has about 110
MB. The variants take turns, a block of steps each, so that a change of the machine's load affects all; every block
resumes from the checkpoint at the end of the block before. A block's first step and its last, whose save every run
waits for, are left out; two saves remain. Every time is that between two records of the metrics, a save included. A
save in the background slows the steps after it, which counts too: of two cores the writer takes one.

The last line is one JSON object, of medians over the blocks: ``async_share`` and ``sync_share`` are the seconds that
one save adds to the steps of its block, beyond their median, divided by those of 10 such steps; ``none_share`` is the
same where nothing was saved, which is noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import measure as measuring

from megatron_dypo.metrics.records import read_metrics
from megatron_dypo.models.random_model import write_random_model

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
EVERY = 10
VARIANTS = {
    "none": ["checkpoint.every=0"],
    "sync": [f"checkpoint.every={EVERY}"],
    "async": [f"checkpoint.every={EVERY}", "checkpoint.async_save=true"],
}
LARGER = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 5, "num_attention_heads": 10}


def make_inputs(folder: Path, *, smoke: bool) -> None:
    """Make the quickstart's data, and a larger model unless ``smoke``."""
    sys.path[:0] = [str(QUICKSTART), str(ROOT / "examples")]
    from model import HF_CONFIG
    from run import make_inputs as make_quickstart

    make_quickstart(folder, seed=1)
    if not smoke:
        vocab_size = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
        write_random_model(folder / "model", {**HF_CONFIG, **LARGER, "vocab_size": vocab_size}, 1)


def train_block(folder: Path, name: str, steps: int, prompts: int) -> None:
    """Train a variant until its run has ``steps`` steps."""
    command = [
        *[sys.executable, "-m", "megatron_dypo.cli", "train", str(QUICKSTART / "warmup.yaml")],
        *[f"run.dir={folder / name}", f"run.steps={steps}", "export.hf=false", "parallel.pipeline=1"],
        *[f"model.hf_path={folder}/model", f"data.prompts=[{folder}/data/warmup.jsonl]", "optimizer.warmup_steps=0"],
        *[f"rollout.prompts_per_round={prompts}", f"batching.prompts_per_update={prompts}", *VARIANTS[name]],
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds(folder: Path, name: str, block: int) -> list[list[float]]:
    """Return the seconds of the steps of each block, without its first and its last."""
    times = {int(row["step"]): float(row["time"]) for row in read_metrics(folder / name / "metrics.jsonl")}
    blocks = [
        [times[step] - times[step - 1] for step in range(first + 2, first + block)]
        for first in range(0, max(times), block)
    ]
    for number, steps in enumerate(blocks):
        print(f"{name:>6}, block {number + 1}: {', '.join(f'{one:.2f}' for one in steps)} s", flush=True)
    return blocks


def share(blocks: Sequence[Sequence[float]]) -> float:
    """Return the cost of a save as a share of EVERY steps, the median over blocks."""
    shares = []
    for steps in blocks:
        saves = max(sum(number % EVERY == 0 for number in range(2, len(steps) + 2)), 1)
        shares.append((sum(steps) / median(steps) - len(steps)) / saves / EVERY)
    return round(median(shares), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two blocks of twelve steps of a tiny model")
    parser.add_argument("--out", type=Path, default=Path("runs/saving"), help="folder for data, model and runs")
    parser.add_argument("--blocks", type=int, default=3)
    args = parser.parse_args()
    args.out = args.out.resolve()  # the commands run in the repository, this program in any folder
    measuring.print_header()
    block, blocks, prompts = (12, 2, 8) if args.smoke else (22, args.blocks, 192)
    make_inputs(args.out, smoke=args.smoke)
    for number in range(1, blocks + 1):
        for name in VARIANTS if number % 2 else reversed(list(VARIANTS)):
            train_block(args.out, name, number * block, prompts)
    measuring.print_result({f"{name}_share": share(seconds(args.out, name, block)) for name in reversed(VARIANTS)})


if __name__ == "__main__":
    main()
