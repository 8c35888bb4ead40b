"""Check a GPU machine: DYPO updates in bf16 and FP8, their agreement, speed and memory, and the fused log-prob.

python tools/gpu_check.py
python tools/gpu_check.py --cpu-smoke --out /tmp/smoke.json
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.gpu_parts, which is not installed


def main(
    out: Annotated[
        Path | None,
        typer.Option(help="Result file; default: benchmarks/results/gpu_<device>_<date>.json.", show_default=False),
    ] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size of the policy.")] = 4096,
    layers: Annotated[int, typer.Option(help="Layers of the policy.")] = 4,
    vocab: Annotated[int, typer.Option(help="Vocabulary size of the policy.")] = 32_000,
    tokens: Annotated[int, typer.Option(help="Approximate tokens of one update.")] = 18_432,
    steps: Annotated[int, typer.Option(help="Updates in each precision.")] = 50,
    cpu_smoke: Annotated[bool, typer.Option(help="A tiny run in fp32 and bf16, on a machine without a GPU.")] = False,
) -> None:
    """Check a GPU machine. Exit code 0: every bar is met; 1: some are not; 2: there is no GPU."""
    from tools.gpu_parts.check import run_check, run_part
    from tools.gpu_parts.logprob_speed import ProjectionSizes
    from tools.gpu_parts.synthetic import CheckSizes

    machine = run_part({"what": "machine"})
    if not machine["on_gpu"] and not cpu_smoke:
        typer.echo("gpu_check: no GPU here: torch sees none; --cpu-smoke runs the same code in small", err=True)
        raise typer.Exit(2)
    sizes = CheckSizes(hidden=hidden, layers=layers, vocab=vocab, tokens=tokens, steps=steps)
    projection = ProjectionSizes()
    if cpu_smoke:
        sizes = CheckSizes(hidden=64, layers=2, head_dim=32, vocab=256, tokens=512, length=32, steps=4)
        projection = ProjectionSizes(tokens=128, hidden=64, vocab=1000, rounds=2)
    with tempfile.TemporaryDirectory() as work:
        result = run_check(machine, sizes, projection, Path(work), say=typer.echo)
    path = out or _default_path(machine["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for bar, is_met in result["verdicts"].items():
        typer.echo(f"{'ok    ' if is_met else 'MISSED'} {bar}")
    typer.echo(str(path))
    if not all(result["verdicts"].values()):
        raise typer.Exit(1)


def _default_path(device: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return Path("benchmarks/results") / f"gpu_{name}_{today.isoformat()}.json"


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"gpu_check: ValueError: {error}")
