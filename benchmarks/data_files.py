"""Compare the opening of prompt files by their index with reading the whole files, as each leader would without it.

    python benchmarks/data_files.py

A JSONL file of a million rows of about 200 bytes is opened, with the stored result of its row check:

- ``index``: by the index in the run folder, as every leader but the first opens it, and the first one at a restart;
- ``scan``: without an index: the file is scanned for line breaks and hashed.

Each process that measures opens the file once. Every round is printed: seconds of the wall clock and of the process's
own processor time, and the growth of its peak memory. Both variants read the check in the same way, which is a part of
each figure. The last line is one JSON object: ``index_vs_scan``, the ratio of medians of the processor time;
``index_mib``, the memory of the worst round with the index.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import measure
import numpy as np

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.row_check.cache import read_check, write_check
from megatron_dypo.data.row_check.check import RowsChecked
from megatron_dypo.data.source import RowSource

_SETTLED_S = 2.5
"""A file that changed within two seconds gets no index."""


def write_rows(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for row, number in enumerate(rng.integers(0, 10**6, count).tolist()):
            prompt = f"What is {number} plus {row}? {'Think step by step. ' * 6}"
            file.write(json.dumps({"id": f"row-{row}", "prompt": prompt, "answer": str(number + row)}) + "\n")


def checked(count: int) -> RowsChecked:
    """Return the result of a check of ``count`` rows, as large as a real one without traces."""
    return RowsChecked(
        prompt_tokens=np.full(count, 40, np.int32),
        trace_start=np.zeros(count + 1, np.int64),
        trace_teacher=np.zeros(0, np.int32),
        trace_tokens=np.zeros(0, np.int32),
        teachers=(),
        verifier=np.full(count, -1, np.int32),
        verifiers=(),
        source=np.zeros(count, np.int32),
        sources=("rows",),
        is_object=np.zeros(count, np.bool_),
        columns=("id", "prompt", "answer"),
        num_failed_checks=0,
        problems={},
    )


def open_once(folder: Path, variant: str) -> None:
    """Open the rows of ``folder``; print what it took, as JSON."""
    data = DataConfig()
    columns = columns_of(data.format, data.fields)
    memory, wall, cpu = measure.peak_bytes(), time.perf_counter(), time.process_time()
    index = folder / "data_check" if variant == "index" else None
    source = RowSource([folder / "rows.jsonl"], columns, keep_row=False, index_folder=index)
    found = read_check(folder / "check.npz")
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    assert found is not None
    assert len(found.prompt_tokens) == len(source)
    print(json.dumps({**took, "mib": (measure.peak_bytes() - memory) / 2**20}))


def measured(rows: int, rounds: int, folder: Path) -> dict[str, float]:
    write_rows(folder / "rows.jsonl", rows)
    write_check(folder / "check.npz", checked(rows))
    time.sleep(_SETTLED_S)
    measure.run_ranks(__file__, ["--folder", str(folder), "--variant", "index"])  # the first leader
    found: dict[str, list[dict[str, float]]] = {"index": [], "scan": []}
    for round_ in range(rounds):
        for variant in reversed(list(found)) if round_ % 2 else found:
            found[variant].append(measure.run_ranks(__file__, ["--folder", str(folder), "--variant", variant]))
    for variant, all_of_it in found.items():
        shown = ", ".join(f"{one['wall']:.2f} ({one['cpu']:.2f}) s {one['mib']:.0f} MiB" for one in all_of_it)
        print(f"{variant:>6}: {shown}", flush=True)
    median = {name: statistics.median(one["cpu"] for one in found[name]) for name in found}
    return {
        "index_vs_scan": round(median["index"] / median["scan"], 3),
        "index_mib": round(max(one["mib"] for one in found["index"]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        open_once(options.folder, options.variant)
        return
    measure.print_header()
    rows, rounds = (2000, 1) if options.smoke else (options.rows, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(rows, rounds, Path(folder))
    measure.print_result(result)


if __name__ == "__main__":
    main()
