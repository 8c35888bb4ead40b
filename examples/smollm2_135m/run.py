"""Run DYPO on a pretrained model: data, model, training, report, summary.

After an interruption, the same command goes on:

    python examples/smollm2_135m/run.py

Every stage but the first is a command. It is printed before it runs, so you can also run it by hand.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Annotated

import typer
from task import draw_questions, write_questions

sys.path.append(str(Path(__file__).resolve().parents[1]))
from whole_job.stages import ROOT, Stages, command, script, write_json
from whole_job.summary import closing_words, summarize

HERE = Path(__file__).resolve().parent.relative_to(ROOT)
DEFAULT_OUT = Path("runs/smollm2")
DEFAULT_SEED = 1
NUM_HELDOUT, NUM_TRAIN = 100, 1000


def make_data(out: Path, seed: int) -> None:
    """Write held-out questions, and other questions to train on."""
    heldout, train = draw_questions([NUM_HELDOUT, NUM_TRAIN], random.Random(seed))
    for name, questions in (("heldout", heldout), ("train", train)):
        path = out / "data" / f"{name}.jsonl"
        write_questions(path, questions)
        print(f"{path}: {len(questions)} questions, the first is: {questions[0].text}")


def overrides(out: Path, seed: int) -> list[str]:
    """Return the overrides of ``dypo.yaml`` if the folder or the seed is not the default."""
    seeds = [f"run.seed={seed}"] if seed != DEFAULT_SEED else []
    if out == DEFAULT_OUT:
        return seeds
    data = [f"data.prompts=[{out}/data/train.jsonl]", f"eval.sets.heldout.path={out}/data/heldout.jsonl"]
    return [f"run.dir={out}/dypo", f"model.hf_path={out}/model", *data, *seeds]


def main(
    out: Annotated[
        Path, typer.Option(help="Folder for everything that is made, from the repository root.")
    ] = DEFAULT_OUT,
    seed: Annotated[int, typer.Option(help="Seed of data and run.")] = DEFAULT_SEED,
    extra: Annotated[
        list[str] | None, typer.Argument(help="section.key=value … for the run.", show_default=False)
    ] = None,
) -> None:
    """Teach a pretrained model with 135 million parameters to add, with DYPO."""
    folder = ROOT / out
    stages = Stages(folder / "stages.json", seed)
    changes = [*overrides(out, seed), *(extra or ())]
    stages.run("data", lambda: make_data(folder, seed))
    stages.run("model", lambda: script(str(HERE / "model.py"), str(out / "model")))
    stages.run("DYPO on additions asked in words", lambda: command("train", str(HERE / "dypo.yaml"), *changes))
    stages.run("report", lambda: command("report", str(out / "dypo")))
    summary = summarize(folder / "dypo" / "metrics.jsonl", eval_set="heldout", seconds=stages.seconds)
    write_json(folder / "summary.json", summary.as_json())
    print(closing_words(summary, out, "example"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
