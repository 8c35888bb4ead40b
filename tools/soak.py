"""Train under faults: kill, stop and damage a run's processes and checkpoints at random moments, and check its laws.

    python tools/soak.py examples/quickstart/dypo.yaml run.steps=2000 eval.every=50 --hours 2 --faults 120

It runs the config without faults (OUT/calm), then under faults (OUT/soak), each start with the same command, until the
run is done or the hours are over; then the run is asked to stop. With --slurm the run under faults is a job, which
starts its trainer again itself, in place or after a requeue. It prints whether steps, books, versions, queues and
log-probs of both runs obeyed their laws in every step, whether processes grew or were left behind, whether the run
named each checkpoint that was damaged and read, whether the accuracy equals that of the calm run at the last step at
which both were evaluated, and how much of the time was training. All of it is in OUT/soak.json; what the processes
used, every two seconds, is in OUT/samples_calm.jsonl and OUT/samples_faults.jsonl.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.soak_parts, which is not installed

if TYPE_CHECKING:
    from tools.soak_parts.soak import Story

Records = Sequence[Mapping[str, Any]]
CALM, FAULTS = "calm", "faults"


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    out: Annotated[Path, typer.Option(help="Folder of both runs and of the result.")] = Path("runs/soak"),
    hours: Annotated[float, typer.Option(help="Time of the run under faults, unless it is done before.")] = 2.0,
    faults: Annotated[int, typer.Option(help="Most faults. They come at random times, evenly over the hours.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 1,
    max_gap: Annotated[float, typer.Option(help="Largest gap of log-probs between trainer and servers.")] = 1e-3,
    max_growth: Annotated[
        float, typer.Option(help="Largest growth of a role's processes in memory, as a share.")
    ] = 0.02,
    max_more: Annotated[
        int, typer.Option(help="Largest growth in descriptors, and in threads, as a number of them.")
    ] = 8,
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
    from tools.soak_parts.jobs import SlurmJob
    from tools.soak_parts.soak import LocalCommand, Soak

    folders = {CALM: out / "calm", FAULTS: out / "soak"}
    out.mkdir(parents=True, exist_ok=True)
    stories: dict[str, Story] = {}

    def run(name: str, max_faults: int) -> None:
        folder = folders[name]
        _require_vacant(folder)
        changes = [*(overrides or []), f"run.dir={folder.resolve()}"]
        soak = Soak(
            LocalCommand(config, changes)
            if slurm is None or name == CALM
            else SlurmJob(config, changes, folder, slurm),
            folder,
            mean_gap_s=3600.0 * hours / faults,
            max_faults=max_faults,
            seed=seed,
            say=lambda words: typer.echo(f"{folder.name}: {words}"),
        )
        typer.echo(f"{folder}, log {folder}.log")
        stories[name] = soak.run(3600.0 * hours)

    if together:
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, folders, (0, faults)))
    else:
        run(CALM, 0)
        run(FAULTS, faults)
    result = judge(folders, stories, max_gap=max_gap, max_growth=max_growth, max_more=max_more)
    (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, story in stories.items():
        lines = (json.dumps(asdict(sample)) for sample in story.samples)
        (out / f"samples_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _show(result, Counter(event.kind for event in stories[FAULTS].events))
    if result["broken"]:
        raise typer.Exit(1)


def judge(
    folders: Mapping[str, Path], stories: Mapping[str, Story], *, max_gap: float, max_growth: float, max_more: int
) -> dict[str, Any]:
    """Return what happened in both runs and the laws that were broken, as JSON."""
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.ending import Cause
    from megatron_dypo.metrics.goodput import measure_goodput
    from megatron_dypo.metrics.records import METRICS_FILE, read_metrics
    from tools.soak_parts.allowed import allowed_by
    from tools.soak_parts.invariants import violations
    from tools.soak_parts.resources import growth_violations, measure_growth
    from tools.soak_parts.witness import find_flips

    broken: list[str] = []
    paths = {name: folder / METRICS_FILE for name, folder in folders.items()}
    records = {name: read_metrics(path) if path.is_file() else [] for name, path in paths.items()}
    grown = {name: measure_growth(story.samples) for name, story in stories.items()}
    for name, folder in folders.items():
        if records[name]:
            allowed = allowed_by(load_config(folder / "config.yaml"), max_gap)
            broken += [f"{name}: {line}" for line in violations(records[name], allowed)]
        else:
            broken.append(f"{name}: no step is on record")
        broken += [f"{name}: left behind by {words}" for words in stories[name].left_behind]
        if (status := stories[name].ends[-1]) not in (Cause.DONE.status, Cause.STOPPED.status):
            broken.append(f"{name}: did not end well: status {status}")
    broken += growth_violations(grown, max_growth=max_growth, max_more=max_more)
    flips = find_flips([(one.kind, one.words, one.time) for one in stories[FAULTS].events], folders[FAULTS])
    broken += flips.silent
    step, accuracy = compare_accuracies(records[CALM], records[FAULTS])
    broken += _differences(accuracy)
    goodput = measure_goodput(folders[FAULTS])
    return {
        **stories[FAULTS].as_json(),
        "broken": broken,
        "growth": {name: {role: asdict(growth) for role, growth in roles.items()} for name, roles in grown.items()},
        "flips": asdict(flips),
        "accuracy": {"step": step, **accuracy},
        "goodput": goodput and {"ratio": goodput.ratio, "wall_s": goodput.wall_s, "seconds": dict(goodput.seconds)},
    }


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
        return None, {CALM: {}, FAULTS: {}}
    return step, {run: _accuracy(records[step]) for run, records in zip((CALM, FAULTS), evaluated, strict=True)}


def _accuracy(record: Mapping[str, Any]) -> dict[str, list[float]]:
    names = [key.removesuffix("_low") for key in record if key.count("/") == 2 and key.endswith("/accuracy_low")]
    return {name: [record[name], record[f"{name}_low"], record[f"{name}_high"]] for name in names}


def _differences(accuracy: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Return a line for each set whose two intervals have no value in common."""
    if not accuracy[CALM]:
        return ["no step at which both runs were evaluated"]
    found = []
    for name, (calm, low, high) in accuracy[CALM].items():
        value, own_low, own_high = accuracy[FAULTS].get(name, [-1.0, -1.0, -1.0])
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
    typer.echo("flipped bits: " + ", ".join(f"{len(found)} {kind}" for kind, found in result["flips"].items()))
    for run, roles in result["growth"].items():
        for role, growth in roles.items():
            typer.echo(f"{run}: {role}: {_growth_words(growth)}")
    for name, (value, low, high) in result["accuracy"][FAULTS].items():
        step, without = result["accuracy"]["step"], result["accuracy"][CALM][name][0]
        typer.echo(f"{name}, step {step}: {value:.1%} [{low:.1%}, {high:.1%}]; without faults {without:.1%}")
    for line in result["broken"]:
        typer.echo(f"BROKEN {line}")
    typer.echo("every law held" if not result["broken"] else f"{len(result['broken'])} laws were broken")


def _growth_words(growth: Mapping[str, Any]) -> str:
    words = [f"{growth['processes']} processes, the longest lived {growth['longest_s']:.0f} s"]
    for name, count in growth["measured"].items():
        value = f"{growth['middle'][name]:+.1%}" if name == "rss" and count else f"{growth['middle'].get(name, 0):+g}"
        words.append(f"{name} {value} in the middle one of {count}" if count else f"{name} not measured")
    return "; ".join(words)


if __name__ == "__main__":
    typer.run(main)
