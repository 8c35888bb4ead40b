"""Keep the finished runs of a study in one small file, from which another checkout goes on.

    python examples/tiny_study/archive.py pack                      # runs/tiny_study → docs/results/cells.tar.xz
    python examples/tiny_study/archive.py unpack                    # and back; then run.py makes the missing ones
    python examples/tiny_study/archive.py pack examples/tiny_study/smollm2.yaml

The file holds what tables and figures are made from: config, verdicts and metrics of each cell, without responses and
without weights. Cells of two checkouts belong together only if they begin with the same weights. So the file has their
digest, and ``unpack`` makes inputs and warm starts again and refuses others.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))
from whole_job.guarded import ROOT
from whole_job.stages import Stages

from megatron_dypo.eval.records import SUMMARY_FILE, read_records, records_path
from megatron_dypo.fs import new_file
from megatron_dypo.metrics.records import METRICS_FILE, read_metrics
from megatron_dypo.study.cells import Cell
from megatron_dypo.study.compare import open_comparison
from megatron_dypo.study.missing import reason
from tiny_study.inputs import TASKS, make_inputs, start_path
from tiny_study.plan import STUDY, Plan, open_plan
from tiny_study.results import CURVES
from tiny_study.specs import DIVERGED, spec_path

_STARTS = "starts.json"
_METRICS = ("step", "time", "ledger/drawn", "rollout/reward", "probe/alpha", "probe/best_alpha", *CURVES)
app = typer.Typer(add_completion=False)


@app.command()
def pack(path: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan of the study.")] = STUDY) -> None:
    """Write the archive of the cells that are done."""
    plan = open_plan(path)
    contents = dict(_files(plan))
    contents[_STARTS] = json.dumps(_starts(plan), indent=1).encode()
    target = archive_path(plan)
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as file, tarfile.open(fileobj=file, mode="w:xz", preset=9) as archive:
        for name in sorted(contents):
            entry = tarfile.TarInfo(name)  # without times and owners, so that equal cells give equal bytes
            entry.size = len(contents[name])
            archive.addfile(entry, io.BytesIO(contents[name]))
    print(f"{target}: {sum(name.endswith('done.json') for name in contents)} runs, {target.stat().st_size:,} bytes")


@app.command()
def unpack(path: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan of the study.")] = STUDY) -> None:
    """Make inputs and warm starts, and put the cells of the archive beside them."""
    plan = open_plan(path)
    stages = Stages(ROOT / plan.out / "stages.json", plan.data_seed)
    with tarfile.open(archive_path(plan)) as archive:
        contents = {entry.name: _bytes(archive, entry) for entry in archive.getmembers()}
    kept: dict[str, str] = json.loads(contents.pop(_STARTS))
    for task in kept:
        make_inputs(Path(plan.out), task, stages, plan.data_seed, plan.warmup_overrides)
    if other := [task for task, digest in _starts(plan).items() if kept.get(task, digest) != digest]:
        raise ValueError(
            f"{archive_path(plan)}: its runs of {', '.join(other)} began with other weights than this machine makes: "
            "they cannot be continued here; start anew"
        )
    out = (ROOT / plan.out).resolve()
    for name, content in contents.items():
        target = (out / name).resolve()
        if not target.is_relative_to(out):
            raise ValueError(f"{archive_path(plan)}: {name}: lies outside of {out}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_file(target) as file:
            file.write(content)
    print(f"{plan.out}: {sum(name.endswith('done.json') for name in contents)} runs")


def archive_path(plan: Plan) -> Path:
    """Return the file, beside the results that the page is rendered from."""
    return ROOT / plan.source.with_name("cells.tar.xz")


def _files(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Yield the name, relative to the study's folder, and the content of each file that is kept."""
    for task in plan.tasks:
        for kind in ("tuning", "final"):
            if (ROOT / spec_path(plan, task, kind)).is_file():
                for cell in open_comparison(spec_path(plan, task, kind)).cells:
                    if cell.is_done():
                        yield from _files_of(cell, Path(plan.out))
                    elif (reason(cell) or "").startswith(DIVERGED):  # a result too
                        yield str(cell.failed_path.relative_to(plan.out)), cell.failed_path.read_bytes()


def _files_of(cell: Cell, out: Path) -> Iterator[tuple[str, bytes]]:
    folder = cell.folder.relative_to(out)
    for path in (cell.config_path, cell.sets_path, cell.done_path, cell.eval_dir / SUMMARY_FILE):
        yield str(folder / path.relative_to(cell.folder)), path.read_bytes()
    for name in cell.config.eval.sets:
        records = records_path(cell.eval_dir, name)
        rows: list[dict[str, object]] = [{**vars(record), "response": ""} for record in read_records(records)]
        yield str(folder / records.relative_to(cell.folder)), _lines(rows)
    rows = [
        {key: value for key, value in record.items() if key in _METRICS or key.endswith("/accuracy")}
        for record in read_metrics(cell.run_dir / METRICS_FILE)
    ]
    yield str(folder / "run" / METRICS_FILE), _lines(rows)


def _lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def _starts(plan: Plan) -> dict[str, str]:
    """Return task → digest of the weights with which its cells begin, for the tasks that have them."""
    found = {}
    for task in plan.tasks:
        files = sorted((ROOT / start_path(plan.folder(task), TASKS[task])).glob("*.safetensors"))
        if files:
            found[task] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return found


def _bytes(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(entry)
    if file is None:
        raise ValueError(f"{archive.name}: {entry.name}: is no file")
    return file.read()


if __name__ == "__main__":
    try:
        app()
    except ValueError as error:
        sys.exit(f"error: {error}")
