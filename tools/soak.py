"""Train under faults: kill, stop and damage a run's processes and checkpoints at random moments, and check its laws.

    python tools/soak.py examples/quickstart/dypo.yaml run.steps=2000 eval.every=50 --hours 2 --faults 120

It runs the config without faults (OUT/calm), then under faults (OUT/soak), each start with the same command, until the
run is done or the hours are over; then the run is asked to stop. With --slurm the run under faults is a job, which
starts its trainer again itself, in place or after a requeue. It prints whether steps, books, log-probs and memory
obeyed their laws in every step, whether the accuracy equals that of the calm run at the last step at which both were
evaluated, and how much of the time was training. All of it is in OUT/soak.json.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.soak_parts, which is not installed

Records = Sequence[Mapping[str, Any]]


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    out: Annotated[Path, typer.Option(help="Folder of both runs and of the result.")] = Path("runs/soak"),
    hours: Annotated[float, typer.Option(help="Time of the run under faults, unless it is done before.")] = 2.0,
    faults: Annotated[int, typer.Option(help="Most faults. They come at random times, evenly over the hours.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 1,
    max_gap: Annotated[float, typer.Option(help="Largest gap of log-probs between trainer and servers.")] = 1e-3,
    max_growth: Annotated[float, typer.Option(help="Largest growth of a process's memory.")] = 0.02,
    together: Annotated[bool, typer.Option(help="Do both runs at the same time.")] = False,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="OPTIONS",
            help="Train under faults as a job of slurm/dypo_70b.sh, submitted with these options of sbatch; all of its "
            "nodes must be on this host.",
        ),
    ] = None,
) -> None:
    """Exit code 0: every law held; 1: one did not."""
    from megatron_dypo.ending import Cause
    from megatron_dypo.metrics.goodput import measure_goodput
    from megatron_dypo.metrics.records import METRICS_FILE, read_metrics
    from tools.soak_parts.invariants import growth, violations
    from tools.soak_parts.jobs import SlurmJob
    from tools.soak_parts.soak import LocalCommand, Soak, Story

    calm, under = out / "calm", out / "soak"
    out.mkdir(parents=True, exist_ok=True)
    stories: dict[Path, Story] = {}

    def run(folder: Path, max_faults: int) -> None:
        _require_vacant(folder)
        changes = [*(overrides or []), f"run.dir={folder.resolve()}"]
        is_job = slurm is not None and folder == under
        soak = Soak(
            SlurmJob(config, changes, folder, slurm or "") if is_job else LocalCommand(config, changes),
            folder,
            mean_gap_s=3600.0 * hours / faults,
            max_faults=max_faults,
            seed=seed,
            say=lambda words: typer.echo(f"{folder.name}: {words}"),
        )
        typer.echo(f"{folder}, log {folder}.log")
        stories[folder] = soak.run(3600.0 * hours)

    if together:
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, (calm, under), (0, faults)))
    else:
        run(calm, 0)
        run(under, faults)
    story, records = stories[under], read_metrics(under / METRICS_FILE)
    goodput, grown = measure_goodput(under), growth([*stories[calm].samples, *story.samples])
    broken = violations(records, max_gap=max_gap)
    broken += [f"{role}: memory grew by {part:.1%}" for role, part in grown["rss"].items() if part > max_growth]
    broken += [f"left behind by {words}" for words in story.left_behind]
    for folder, its_story in stories.items():
        if its_story.ends[-1] not in (Cause.DONE.status, Cause.STOPPED.status):
            broken.append(f"{folder} did not end well: status {its_story.ends[-1]}")
    step, accuracy = compare_accuracies(read_metrics(calm / METRICS_FILE), records)
    broken += _differences(accuracy)
    result = {
        **story.as_json(),
        "broken": broken,
        "growth": grown,
        "accuracy": {"step": step, **accuracy},
        "goodput": goodput and {"ratio": goodput.ratio, "wall_s": goodput.wall_s, "seconds": dict(goodput.seconds)},
    }
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _show(result, Counter(event.kind for event in story.events))
    if broken:
        raise typer.Exit(1)


def _require_vacant(folder: Path) -> None:
    if folder.exists():
        raise typer.BadParameter(f"{folder} exists: remove it, or choose another --out")


def compare_accuracies(calm: Records, faults: Records) -> tuple[int | None, dict[str, dict[str, list[float]]]]:
    """Return the last step at which both runs were evaluated, and run → set → [accuracy, lower bound, upper bound]."""
    evaluated = [
        {record["step"]: record for record in records if any(key.endswith("/accuracy_low") for key in record)}
        for records in (calm, faults)
    ]
    step = max(set.intersection(*map(set, evaluated)), default=None)
    if step is None:
        return None, {"calm": {}, "faults": {}}
    return step, {run: _accuracy(records[step]) for run, records in zip(("calm", "faults"), evaluated, strict=True)}


def _accuracy(record: Mapping[str, Any]) -> dict[str, list[float]]:
    names = [key.removesuffix("_low") for key in record if key.count("/") == 2 and key.endswith("/accuracy_low")]
    return {name: [record[name], record[f"{name}_low"], record[f"{name}_high"]] for name in names}


def _differences(accuracy: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Return a line for each set whose two intervals have no value in common."""
    if not accuracy["calm"]:
        return ["no step at which both runs were evaluated"]
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
        step, without = result["accuracy"]["step"], result["accuracy"]["calm"][name][0]
        typer.echo(f"{name}, step {step}: {value:.1%} [{low:.1%}, {high:.1%}]; without faults {without:.1%}")
    for line in result["broken"]:
        typer.echo(f"BROKEN {line}")
    typer.echo("every law held" if not result["broken"] else f"{len(result['broken'])} laws were broken")


if __name__ == "__main__":
    typer.run(main)
