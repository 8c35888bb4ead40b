"""Run the quickstart: data, model, warm start, DYPO, report, summary. After an interruption, the same command goes on.

    python examples/quickstart/run.py

Every stage but the first is a command of ``megatron-dypo``. It is printed before it runs, so you can also run it by
hand.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Annotated

import typer
from model import write_model
from task import draw_problems, write_problems

sys.path.append(str(Path(__file__).resolve().parents[1]))
from whole_job.stages import ROOT, Stages, command, write_json
from whole_job.summary import closing_words, summarize

HERE = Path(__file__).resolve().parent.relative_to(ROOT)
DEFAULT_OUT = Path("runs/quickstart")
DEFAULT_SEED = 1

HELDOUT = {0: 40, 1: 80, 2: 140, 3: 140}
WARMUP = {0: 8000, 1: 8000}
TRAIN = {0: 400, 1: 800, 2: 1400, 3: 1400}
"""Number of carries → number of problems. Problems with two or three carries are new to the warm-started policy."""


def make_inputs(out: Path, seed: int) -> None:
    """Write problems for the warm start, for DYPO and for evaluation, all different, and a random model."""
    rng = random.Random(seed)
    heldout = draw_problems(HELDOUT, rng)
    train = draw_problems(TRAIN, rng, exclude=heldout)
    warmup = draw_problems(WARMUP, rng, exclude=[*heldout, *train])
    for name, problems in (("heldout", heldout), ("train", train), ("warmup", warmup)):
        path = out / "data" / f"{name}.jsonl"
        write_problems(path, problems)
        print(f"{path}: {len(problems)} problems, the first is {problems[0].prompt}")
    count = write_model(out / "model", seed)
    print(f"{out / 'model'}: a random Qwen3 of {count:,} parameters and its tokenizer")


def overrides(out: Path, seed: int, stage: str) -> list[str]:
    """Return the overrides of a stage's config if the folder of the results or the seed is not the default."""
    seeds = [f"run.seed={seed}"] if seed != DEFAULT_SEED else []
    if out == DEFAULT_OUT:
        return seeds
    paths = {
        "warmup": [f"model.hf_path={out}/model", f"data.prompts=[{out}/data/warmup.jsonl]"],
        "dypo": [
            f"model.hf_path={out}/warmup/hf",
            f"data.prompts=[{out}/data/train.jsonl]",
            f"eval.sets.heldout.path={out}/data/heldout.jsonl",
        ],
    }
    return [f"run.dir={out}/{stage}", *paths[stage], *seeds]


def main(
    out: Annotated[
        Path, typer.Option(help="Folder for everything that is made, from the repository root.")
    ] = DEFAULT_OUT,
    seed: Annotated[int, typer.Option(help="Seed of data, weights and runs.")] = DEFAULT_SEED,
    extra: Annotated[
        list[str] | None, typer.Argument(help="section.key=value … for the DYPO run.", show_default=False)
    ] = None,
) -> None:
    """Train a tiny model with DYPO from start to end."""
    folder = ROOT / out
    stages = Stages(folder / "stages.json", seed)

    def train(stage: str, *more: str) -> None:
        command("train", str(HERE / f"{stage}.yaml"), *overrides(out, seed, stage), *more)

    stages.run("data and model", lambda: make_inputs(folder, seed))
    stages.run("warm start: supervised training on additions with no or one carry", lambda: train("warmup"))
    stages.run("DYPO on additions with up to three carries", lambda: train("dypo", *(extra or ())))
    stages.run("report", lambda: command("report", str(out / "dypo")))
    summary = summarize(folder / "dypo" / "metrics.jsonl", eval_set="heldout", seconds=stages.seconds)
    write_json(folder / "summary.json", summary.as_json())
    print(closing_words(summary, out, "quickstart"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
