"""The quickstart: data, model, warm start, DYPO, report, summary. Run again after an interruption, it goes on.

    python examples/quickstart/run.py

Every stage but the first is a command of ``megatron-dypo``, printed before it runs, and so can be run by hand.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from model import write_model
from summary import Summary, summarize
from task import draw_problems, write_problems

from megatron_dypo.fs import replace_file

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)
DEFAULT_OUT = Path("runs/quickstart")
DEFAULT_SEED = 1

HELDOUT = {0: 40, 1: 80, 2: 140, 3: 140}
WARMUP = {0: 8000, 1: 8000}
TRAIN = {0: 400, 1: 800, 2: 1400, 3: 1400}
"""Number of carries → number of problems. Problems with two or three carries are new to the warm-started policy."""


class Stages:
    """Which stages are complete and how long each took, kept in a file, so that a second call goes on."""

    def __init__(self, path: Path, seed: int) -> None:
        """Raises ValueError when the folder holds a quickstart of another seed."""
        self._path = path
        self._state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seed": seed, "stages": {}}
        if self._state["seed"] != seed:
            raise ValueError(
                f"--seed {seed}: {path} is of seed {self._state['seed']}; choose another --out or remove it"
            )

    @property
    def seconds(self) -> float:
        """Time of all stages, those of earlier calls and broken-off ones included."""
        return sum(float(stage["seconds"]) for stage in self._state["stages"].values())

    def run(self, name: str, action: Callable[[], None]) -> None:
        """Run a stage unless it is complete."""
        stage = self._state["stages"].setdefault(name, {"seconds": 0.0, "complete": False})
        if stage["complete"]:
            print(f"\n== {name}: done before ({stage['seconds']:.0f} s)", flush=True)
            return
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        try:
            action()
            stage["complete"] = True
        finally:
            stage["seconds"] = float(stage["seconds"]) + time.monotonic() - start
            write_json(self._path, self._state)


def make_inputs(out: Path, seed: int) -> None:
    """Problems for the warm start, for DYPO and held-out ones, all different; and a random model."""
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
    """What a config of this folder must be told when the place of the results, or the seed, is not the usual one."""
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


def command(*arguments: str) -> None:
    """Print and run ``megatron-dypo …``; end this program if it fails."""
    print("$ megatron-dypo " + shlex.join(arguments), flush=True)
    finished = subprocess.run([sys.executable, "-m", "megatron_dypo.cli", *arguments], cwd=ROOT, check=False)
    if finished.returncode:
        sys.exit(
            f"megatron-dypo {arguments[0]} ended with status {finished.returncode}; run the quickstart again to go on"
        )


def write_json(path: Path, content: object) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=2) + "\n")


def closing_words(summary: Summary, out: Path) -> str:
    """What the reader should see at the end."""

    def accuracy(value: float, interval: tuple[float, float]) -> str:
        return f"{value:6.1%}   (95% interval {interval[0]:.1%} to {interval[1]:.1%})"

    def tiers(shares: dict[str, float]) -> str:
        return "   ".join(f"{tier} {share:4.0%}" for tier, share in shares.items())

    return f"""
held-out accuracy   before {accuracy(summary.accuracy_before, summary.accuracy_before_interval)}
                    after  {accuracy(summary.accuracy_after, summary.accuracy_after_interval)}
prompts drawn       at the start   {tiers(summary.tiers_first)}
                    at the end     {tiers(summary.tiers_last)}
a step              {summary.step_seconds:.1f} s, of which {summary.overhead:.1%} outside rollouts, grading, training and refits
whole quickstart    {summary.seconds:.0f} s
report              {out / "dypo" / "report.html"}
HF model            {out / "dypo" / "hf"}
summary             {out / "summary.json"}"""


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
    print(closing_words(summary, out))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
