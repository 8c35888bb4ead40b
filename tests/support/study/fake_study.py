"""The commands of a cell of examples/tiny_study without a model, and a plan whose cells run them.

``python -m tests.support.study.fake_study JOURNAL train CELL`` and ``… eval CELL``. Orders and journal are those of
``fake_program``. How often a method is right depends on its name and its learning rate alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.study.fake_program import luck, note, record, train

ITEMS = 30
RATES = {0.001: 0.2, 0.01: 0.5, 0.1: 0.5}
"""Learning rate → share of the items that a method gets right; two rates tie."""
METHODS = {"dypo": 0.3, "grpo": 0.0}
"""Method → the share that it gets right in addition."""
STEPS = 3


def main() -> int:
    journal, verb, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    cell = "/".join(folder.parts[-2:])
    note(journal, f"begin {verb} {cell}")
    if verb == "train":
        write_metrics(folder)
        train(journal, folder, cell)
    else:
        evaluate(folder)
    note(journal, f"end {verb} {cell}")
    return 0


def write_metrics(folder: Path) -> None:
    (folder / "run").mkdir(exist_ok=True)
    sets = yaml.safe_load((folder / "eval.yaml").read_text())["eval"]["sets"]
    first = {"step": 0, **{f"eval/{name}/accuracy": 0.25 for name in sets}}
    steps = [
        {
            "step": step,
            "rollout/reward": 0.5,
            "ledger/drawn": 16.0 * step,
            "gate/hard": 1 / step,
            "train/grad_norm": step,
        }
        for step in range(1, STEPS + 1)
    ]
    lines = [json.dumps(row) + "\n" for row in (first, *steps)]
    (folder / "run" / "metrics.jsonl").write_text("".join(lines))


def evaluate(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    right = RATES[config["optimizer"]["lr"]] + METHODS[config["objective"]["name"]]
    seed = int(folder.name.removeprefix("seed-"))
    out = folder / "eval"
    out.mkdir(exist_ok=True)
    for name in config["eval"]["sets"]:
        # Luck does not depend on the learning rate, so that equal shares are equal accuracies.
        lines = [record(name, f"item{i}", seed, luck(name, i, seed) < right) for i in range(ITEMS)]
        (out / f"{name}.jsonl").write_text("".join(lines))
    (out / "summary.json").write_text("{}")


def write_plan(folder: Path, **changes: Any) -> Path:
    """Write a plan of two methods, two rates and two seeds, whose inputs are made; its cells run this program."""
    fake = [sys.executable, "-m", "tests.support.study.fake_study", str(folder / "journal.txt")]
    plan = {
        "title": "A fake study",
        "command": "make fake-study",
        "config": "examples/quickstart/dypo.yaml",
        "out": str(folder / "out"),
        "page": str(folder / "docs" / "fake.md"),
        "tasks": ["additions"],
        "steps": STEPS,
        "overrides": {"optimizer.warmup_steps": 1},
        "learning_rates": [0.1, 0.001, 0.01],
        "seeds": [1, 2],
        "baseline": "dypo",
        "methods": {name: {"objective.name": name} for name in METHODS},
        "copies": {"dypo_again": "dypo"},
        "shown": ["dypo"],
        "resamples": 399,
        "seconds": {"inputs": 1, "cell": 1, "step": 1, "step_of_traces": 1},
        "train_command": [*fake, "train", "{cell}"],
        "eval_command": [*fake, "eval", "{cell}"],
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**plan, **changes}, sort_keys=False))
    (folder / "out").mkdir(exist_ok=True)
    stages = {f"additions: {name}": {"seconds": 0.0, "complete": True} for name in ("data", "model", "warm start")}
    (folder / "out" / "stages.json").write_text(json.dumps({"seed": 1, "stages": stages}))
    return path


if __name__ == "__main__":
    sys.exit(main())
