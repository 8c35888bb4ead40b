"""Check a machine with GPUs in stages: kernels, updates, servers, a short run, memory and parallel layouts.

python tools/gpu_check.py
python tools/gpu_check.py --cpu-smoke --out /tmp/smoke

Each stage takes at most ten minutes on one GPU and writes its own file; the same command goes on after those that are
done. OUT/result.json and OUT/page.md hold everything.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.gpu_parts, which is not installed


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/gpu_check"),
    only: Annotated[
        str | None, typer.Option(help="Names of stages, with commas; default: all.", show_default=False)
    ] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size of the policy.")] = 4096,
    layers: Annotated[int, typer.Option(help="Layers of the policy.")] = 4,
    vocab: Annotated[int, typer.Option(help="Vocabulary size of the policy.")] = 32_000,
    tokens: Annotated[int, typer.Option(help="Approximate tokens of one update.")] = 18_432,
    steps: Annotated[int, typer.Option(help="Updates in each precision.")] = 50,
    override: Annotated[
        list[str] | None,
        typer.Option(help="Config field=value for all runs with servers; may be repeated.", show_default=False),
    ] = None,
    cpu_smoke: Annotated[bool, typer.Option(help="Every stage in small, on a machine without a GPU.")] = False,
) -> None:
    """Check a machine with GPUs. Exit code 0: every bar is met; 1: some are not; 2: there is no GPU."""
    from megatron_dypo.metrics.versions import collect_versions
    from tools.gpu_parts.logprob_speed import ProjectionSizes
    from tools.gpu_parts.page import write_result
    from tools.gpu_parts.plan_of_stages import Plan, plan_stages
    from tools.gpu_parts.run_part import run_part
    from tools.gpu_parts.stages import is_good, run_stages
    from tools.gpu_parts.synthetic import CheckSizes

    machine = run_part({"what": "machine"})
    if not machine["on_gpu"] and not cpu_smoke:
        typer.echo("gpu_check: no GPU here: torch sees none; --cpu-smoke runs every stage in small", err=True)
        raise typer.Exit(2)
    sizes, projection = (
        CheckSizes(hidden=hidden, layers=layers, vocab=vocab, tokens=tokens, steps=steps),
        ProjectionSizes(),
    )
    if cpu_smoke:
        sizes = CheckSizes(hidden=64, layers=2, head_dim=32, vocab=256, tokens=512, length=32, steps=4)
        projection = ProjectionSizes(tokens=128, hidden=64, vocab=1000, rounds=2)
    plan = Plan(
        machine=machine,
        folder=out.resolve(),
        sizes=sizes,
        projection=projection,
        overrides=tuple(override or ()),
        is_smoke=cpu_smoke,
    )
    stages = plan_stages(plan, say=typer.echo)
    names = [stage.name for stage in stages]
    chosen = only.split(",") if only else names
    if unknown := sorted(set(chosen) - set(names)):
        raise ValueError(f"--only {only}: {', '.join(unknown)}: the stages are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    versions = collect_versions()
    key = {
        "machine": machine,
        "versions": versions,
        "sizes": [asdict(sizes), asdict(projection)],
        "overrides": list(plan.overrides),
    }
    results = run_stages([stage for stage in stages if stage.name in chosen], out, key, typer.echo)
    write_result(out, machine, versions, stages, results)
    typer.echo(str(out / "page.md"))
    if not all(is_good(result) for result in results.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"gpu_check: ValueError: {error}")
