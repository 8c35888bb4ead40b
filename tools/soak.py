"""Train under faults: kill, stop and damage a run's processes and checkpoints at random moments, and check its laws.

    python tools/soak.py examples/quickstart/dypo.yaml run.steps=2000 --hours 2 --faults 120

It runs the config once without faults (OUT/calm), then under faults (OUT/soak), each start with the same command, until
the run is done. Then it prints whether steps, books, log-probs and memory obeyed their laws in every step, whether the
accuracy equals that of the calm run, and how much of the time was training. All of it is in OUT/soak.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.soak_parts, which is not installed


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    out: Annotated[Path, typer.Option(help="Folder of both runs and of the result.")] = Path("runs/soak"),
    hours: Annotated[float, typer.Option(help="Time in which the run under faults must be done.")] = 2.0,
    faults: Annotated[int, typer.Option(help="Most faults. They come at random times, evenly over the hours.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 1,
    max_gap: Annotated[float, typer.Option(help="Largest gap of log-probs between trainer and servers.")] = 1e-3,
    max_growth: Annotated[float, typer.Option(help="Largest growth of a process's memory.")] = 0.02,
) -> None:
    """Exit code 0: every law held; 1: one did not."""
    from megatron_dypo.metrics.goodput import measure_goodput
    from megatron_dypo.metrics.records import METRICS_FILE, read_metrics
    from tools.soak_parts.invariants import growth, violations
    from tools.soak_parts.soak import Soak, train_command

    calm, under = out / "calm", out / "soak"
    out.mkdir(parents=True, exist_ok=True)
    _require_vacant(under)
    typer.echo(f"the calm run, log {calm}.log")
    _train(train_command(config, [*(overrides or []), f"run.dir={calm}"]), calm)
    soak = Soak(
        train_command(config, [*(overrides or []), f"run.dir={under}"]),
        under,
        mean_gap_s=3600.0 * hours / faults,
        max_faults=faults,
        seed=seed,
        say=typer.echo,
    )
    typer.echo(f"the run under faults, log {under}.log")
    story = soak.run(3600.0 * hours)
    records = read_metrics(under / METRICS_FILE)
    goodput, grown = measure_goodput(under), growth(story.samples)
    broken = violations(records, max_gap=max_gap)
    broken += [f"{role}: memory grew by {part:.1%}" for role, part in grown["rss"].items() if part > max_growth]
    broken += [f"left behind by {words}" for words in story.left_behind]
    broken += [] if story.ends[-1] == 0 else [f"the run is not done: status {story.ends[-1]}"]
    accuracy = {
        name: _accuracy(read_metrics(folder / METRICS_FILE)) for name, folder in (("calm", calm), ("faults", under))
    }
    broken += _differences(accuracy)
    result = {
        **story.as_json(),
        "broken": broken,
        "growth": grown,
        "accuracy": accuracy,
        "goodput": goodput and {"ratio": goodput.ratio, "wall_s": goodput.wall_s, "seconds": dict(goodput.seconds)},
    }
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _show(result, Counter(event.kind for event in story.events))
    if broken:
        raise typer.Exit(1)


def _require_vacant(folder: Path) -> None:
    if folder.exists():
        raise typer.BadParameter(f"{folder} exists: remove it, or choose another --out")


def _train(command: Sequence[str], run_dir: Path) -> None:
    with run_dir.with_name(f"{run_dir.name}.log").open("ab") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if status:
        raise typer.BadParameter(f"the calm run ended with status {status}; see {run_dir}.log")


def _accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return set → [accuracy, its lower bound, its upper bound] of the last evaluation."""
    last: Mapping[str, Any] = next(
        (record for record in reversed(records) if any(key.endswith("/accuracy_low") for key in record)), {}
    )
    names = [key.removesuffix("_low") for key in last if key.count("/") == 2 and key.endswith("/accuracy_low")]
    return {name: [last[name], last[f"{name}_low"], last[f"{name}_high"]] for name in names}


def _differences(accuracy: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Return a line for each set whose two intervals have no value in common."""
    found = []
    for name, (calm, low, high) in accuracy["calm"].items():
        value, own_low, own_high = accuracy["faults"].get(name, [-1.0, -1.0, -1.0])
        if own_low > high or own_high < low:
            found.append(f"{name}: {value:.1%} under faults, {calm:.1%} without: their intervals are apart")
    return found


def _show(result: Mapping[str, Any], kinds: Mapping[str, int]) -> None:
    for kind, count in sorted(kinds.items()):
        back = sorted(event["back_s"] for event in result["events"] if event["kind"] == kind and event["back_s"])
        middle = f", back after {back[len(back) // 2]:.0f} s (median), {back[-1]:.0f} s at most" if back else ""
        typer.echo(f"{kind}: {count}{middle}")
    typer.echo(f"starts: {len(result['ends'])}, ends: {dict(Counter(result['ends']))}")
    if result["goodput"]:
        typer.echo(f"goodput: {result['goodput']['ratio']:.1%} of {result['goodput']['wall_s'] / 3600:.2f} h")
    for name, (value, low, high) in result["accuracy"]["faults"].items():
        typer.echo(
            f"{name}: {value:.1%} [{low:.1%}, {high:.1%}]; without faults {result['accuracy']['calm'][name][0]:.1%}"
        )
    for line in result["broken"]:
        typer.echo(f"BROKEN {line}")
    typer.echo("every law held" if not result["broken"] else f"{len(result['broken'])} laws were broken")


if __name__ == "__main__":
    typer.run(main)
