"""Compare the opening of prompt files by their index with reading the whole files, as each leader would without it.

    python benchmarks/data_files.py

A JSONL file of a million rows of about 200 bytes is opened, with the stored result of its row check:

- ``first``: by the first leader of a run, which reads the file and writes the index into the run folder;
- ``index``: by the index in the run folder, as every leader but the first opens it, and the first one at a restart;
- ``scan``: without an index: the file is scanned for line breaks and hashed.

Each process that measures opens the file once. Every round is printed: seconds of the wall clock and of the process's
own processor time, the growth of its peak memory, and the median processor time of reading a row drawn at random, of
300. All variants read the check in the same way, which is a part of each figure. Then four leaders, who wait for each
other as those of a run do (:func:`first_leader_first`), open the file for the first time.

The last line is one JSON object: ``index_vs_scan``, the ratio of medians of the processor time; ``index_mib``, the
memory of the worst round with the index; ``row_us``, the processor time of a row with the index; ``reads_by_4``, the
bytes that the four leaders read, divided by the size of the file. The first one reads it twice: for the rows, and for
the digest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
import torch.distributed as dist

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.row_check.cache import read_check, write_check
from megatron_dypo.data.row_check.check import RowsChecked
from megatron_dypo.data.source import RowSource
from megatron_dypo.loop.setup.open_data import first_leader_first

_SETTLED_S = 2.5
"""A file that changed within two seconds gets no index."""
_ROWS = 300
"""Rows that are read at random."""


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


def open_rows(folder: Path, variant: str) -> RowSource:
    data = DataConfig()
    index = None if variant == "scan" else folder / "data_check"
    return RowSource(
        [folder / "rows.jsonl"], columns_of(data.format, data.fields), keep_row=False, index_folder=index
    )  # fmt: skip


def open_once(folder: Path, variant: str) -> None:
    """Open the rows of ``folder``; print what it took, as JSON."""
    memory, wall, cpu = measure.peak_bytes(), time.perf_counter(), time.process_time()
    source = open_rows(folder, variant)
    found = read_check(folder / "check.npz")
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    memory = measure.peak_bytes() - memory
    assert found is not None
    assert len(found.prompt_tokens) == len(source)
    rows = []
    for number in np.random.default_rng(0).integers(0, len(source), _ROWS).tolist():
        start = time.process_time()
        assert source.row(number).prompt_id == f"row-{number}"
        rows.append(time.process_time() - start)
    print(json.dumps({**took, "mib": memory / 2**20, "row_us": 1e6 * statistics.median(rows)}))


def open_in_turn(folder: Path) -> None:
    """Open the rows as one of a run's leaders; the first one prints the bytes that all read, and their memory."""
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    before, memory = bytes_read(), measure.peak_bytes()
    with first_leader_first(dist.group.WORLD):
        open_rows(folder, "index")
    everyone: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (bytes_read() - before, measure.peak_bytes() - memory))
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.destroy_process_group()


def bytes_read() -> int:
    """Return the bytes that this process has read from files, from the page cache or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measured(rows: int, rounds: int, folder: Path) -> dict[str, float]:
    write_rows(folder / "rows.jsonl", rows)
    write_check(folder / "check.npz", checked(rows))
    time.sleep(_SETTLED_S)
    found: dict[str, list[dict[str, float]]] = {"first": [], "index": [], "scan": []}
    for _ in range(rounds):
        shutil.rmtree(folder / "data_check", ignore_errors=True)
        for variant in found:  # the first one writes the index
            found[variant].append(measure.run_ranks(__file__, ["--folder", str(folder), "--variant", variant]))
    for variant, all_of_it in found.items():
        shown = ", ".join(
            f"{one['wall']:.2f} ({one['cpu']:.2f}) s {one['mib']:.0f} MiB, {one['row_us']:.0f} us a row"
            for one in all_of_it
        )
        print(f"{variant:>6}: {shown}", flush=True)
    shutil.rmtree(folder / "data_check")
    leaders = measure.run_ranks(__file__, ["--folder", str(folder), "--variant", "leaders"], ranks=4)
    size = (folder / "rows.jsonl").stat().st_size
    shown = ", ".join(f"{read / size:.2f} ({memory / 2**20:.0f} MiB)" for read, memory in leaders)
    print(f"4 leaders read, in sizes of the file: {shown}", flush=True)
    median = {name: statistics.median(one["cpu"] for one in found[name]) for name in found}
    return {
        "index_vs_scan": round(median["index"] / median["scan"], 3),
        "index_mib": round(max(one["mib"] for one in found["index"]), 1),
        "row_us": round(statistics.median(one["row_us"] for one in found["index"])),
        "reads_by_4": round(sum(read for read, _ in leaders) / size, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant == "leaders":
        open_in_turn(options.folder)
        return
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
