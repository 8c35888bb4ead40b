"""Make two steps of DYPO by the public Python API: make a tiny model and its data, train, read what the run wrote.

    python examples/from_python.py

The model has a million random weights and knows nothing yet. So every prompt is Hard, and both steps learn from the
teachers' traces. ``make quickstart`` shows a whole run.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo import Cause, dump_config, load_config, read_metrics, read_samples, render_report, run_training

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "quickstart"))

from model import write_model  # noqa: E402 (a module of the quickstart, beside this file)
from task import draw_problems, write_problems  # noqa: E402


def make_inputs(folder: Path) -> None:
    """Write a model folder with random weights, training problems and held-out problems."""
    draw = random.Random(1)
    held_out = draw_problems({0: 4, 1: 4}, draw)
    train = draw_problems({0: 20, 1: 20}, draw, exclude=held_out)
    write_problems(folder / "train.jsonl", train)
    write_problems(folder / "held_out.jsonl", held_out)
    write_model(folder / "model", seed=1)


def main(
    out: Annotated[Path, typer.Option(help="Folder for inputs and run.")] = Path("runs/from_python"),
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
) -> None:
    """Train two steps and print what they learned from."""
    make_inputs(out)
    config = load_config(
        HERE / "quickstart" / "dypo.yaml",
        [
            f"run.dir={out / 'run'}",
            "run.steps=2",
            f"model.hf_path={out / 'model'}",
            "parallel.pipeline=1",
            f"data.prompts=[{out / 'train.jsonl'}]",
            f"eval.sets.held_out.path={out / 'held_out.jsonl'}",
            "optimizer.warmup_steps=0",
            *(overrides or []),
        ],
    )
    print(dump_config(config))

    cause = run_training(config)  # starts the SGLang server and the ranks, and waits for their end
    if cause is not Cause.DONE:
        sys.exit(f"the run ended: {cause.label} (status {cause.status})")

    run = Path(config.run.dir)
    for record in read_metrics(run / "metrics.jsonl"):
        shown = {name: record[name] for name in ("gate/hard", "train/sft_nll", "train/grad_norm") if name in record}
        print(f"step {record['step']}: {shown}")
    sample = next(row for row in read_samples(run) if row["teacher"])
    print(f"{sample['prompt']} learned from {sample['teacher']}: {sample['trace']}")
    print("report:", render_report(run))


if __name__ == "__main__":
    typer.run(main)
