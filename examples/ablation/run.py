"""Train every row of ``ablation.yaml`` and print the table. After an interruption, the same command goes on.

    python examples/ablation/run.py                   # all rows
    python examples/ablation/run.py dypo no_gal       # these two

Every row begins with the warm start that ``make quickstart`` leaves in ``runs/quickstart``. Each row is a run of
``megatron-dypo train`` in ``runs/ablation/<row>/seed-<n>``; its command is printed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from megatron_dypo.config.reading.load import flow_yaml, load_config
from megatron_dypo.metrics.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SPEC = Path(__file__).resolve().parent / "ablation.yaml"


def read_spec() -> dict[str, Any]:
    """Return the description: ``config``, ``out``, ``seeds``, ``methods`` and ``tables``."""
    return yaml.safe_load(SPEC.read_text(encoding="utf-8"))


def overrides_of(spec: dict[str, Any], row: str, seed: int) -> list[str]:
    """Return the overrides of a row's run, in the form of ``train``'s arguments."""
    own = {"run.dir": str(run_dir(spec, row, seed)), "run.seed": seed, **spec["methods"][row]}
    return [f"{key}={flow_yaml(value)}" for key, value in own.items()]


def run_dir(spec: dict[str, Any], row: str, seed: int) -> Path:
    """Return the run folder of a row."""
    return Path(spec["out"]) / row / f"seed-{seed}"


def train(spec: dict[str, Any], row: str, seed: int) -> None:
    """Train a row, unless its model exists already."""
    overrides = overrides_of(spec, row, seed)
    load_config(ROOT / spec["config"], overrides)
    if (ROOT / run_dir(spec, row, seed) / "hf").is_dir():
        return
    command = [sys.executable, "-m", "megatron_dypo.cli", "train", spec["config"], *overrides]
    print(shlex.join(["megatron-dypo", *command[3:]]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def accuracies(folder: Path) -> dict[str, float]:
    """Return the last accuracy of each evaluation set of a run; {} if it has not been evaluated."""
    found: dict[str, float] = {}
    for record in read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else ():
        found |= {key: value for key, value in record.items() if key.startswith("eval/") and key.endswith("/accuracy")}
    return found


def table(spec: dict[str, Any], rows: Iterable[str]) -> str:
    """Return a table of the rows and their accuracies in percent, each the mean over seeds."""
    lines = []
    for row in rows:
        seen = [own for seed in spec["seeds"] if (own := accuracies(ROOT / run_dir(spec, row, seed)))]
        means = {name: sum(own[name] for own in seen) / len(seen) for name in (seen[0] if seen else ())}
        cells = "  ".join(f"{name.split('/')[1]} {100 * mean:5.1f}" for name, mean in means.items())
        lines.append(f"{row:22} {cells or '(not run)'}")
    return "\n".join(lines)


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="rows of ablation.yaml; default: all")] = None,
) -> None:
    """Train rows that are missing, then print the tables."""
    spec = read_spec()
    if unknown := sorted(set(rows or ()) - set(spec["methods"])):
        raise typer.BadParameter(f"{', '.join(unknown)}: rows are {', '.join(spec['methods'])}")
    for row in rows or spec["methods"]:
        for seed in spec["seeds"]:
            train(spec, row, seed)
    for name, shown in spec["tables"].items():
        print(f"\n{name}\n{table(spec, shown['methods'])}")


if __name__ == "__main__":
    typer.run(main)
