"""Apply mutants one at a time in a copy of the tree, and run the tests that stand for the file.

    python -m tests.mutation.run --only objective --only batching --jobs 2

It prints every survivor. ``equivalents.json`` names mutants that change nothing, with the reason; they are not run. The
exit status is 1 if fewer than 95% of the others were killed, or a mutant written by hand no longer fits its file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.mutation.catalogue import ROOMS, Room, files_of, tests_of
from tests.mutation.handwritten import HANDWRITTEN
from tests.mutation.operators import Mutant, mutants_of, sample

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENTS = Path(__file__).with_name("equivalents.json")
BAR = 0.95
KEY = ("path", "function", "text", "old", "new")
"""Fields that name a mutant in a report and among the equivalents (see ``Mutant.key``)."""
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".hypothesis", ".*_cache", "runs", "shared")


@dataclass(kw_only=True)
class Outcome:
    """The outcome of one mutant."""

    room: str
    mutant: Mutant
    state: str
    """killed, survived, late (killed by its limit of CPU time), equivalent, or untested."""
    cpu_s: float = 0.0
    tail: list[str] = field(default_factory=list)


class Worker:
    """One process of :mod:`tests.mutation.worker` in a copy of the tree."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(ROOT, folder, ignore=_NOT_COPIED, symlinks=True)
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutation.worker"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, tests: Sequence[str], cpu_s: float, *, path: str = "", source: bytes = b"") -> dict[str, Any]:
        """Run ``tests`` with ``source`` in place of the file ``path``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        task = {"path": path, "source": source.decode(), "tests": list(tests), "cpu_s": cpu_s}
        print(json.dumps(task), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def chosen(name: str, room: Room, seed: int, count: int | None) -> tuple[list[Mutant], list[str]]:
    """Return the room's mutants, and a line for each handwritten mutant that no longer fits its file."""
    files = files_of(room, ROOT)
    drawn = [m for path in files for m in mutants_of(path, (ROOT / path).read_text())]
    mutants, misfits = sample(drawn, room.count if count is None else count, seed), []
    for hand in (h for h in HANDWRITTEN if h.path in files):
        source = (ROOT / hand.path).read_bytes()
        if source.count(hand.old.encode()) != 1:
            misfits.append(f"{hand.path}: {hand.old!r} occurs {source.count(hand.old.encode())} times ({hand.law})")
            continue
        start = source.index(hand.old.encode())
        line = source.count(b"\n", 0, start) + 1
        end = start + len(hand.old.encode())
        mutants.append(
            Mutant(
                path=hand.path,
                function="",
                line=line,
                text="",
                start=start,
                end=end,
                old=hand.old,
                new=hand.new,
                rule=hand.law,
            )
        )
    return mutants, misfits


@contextmanager
def workers(jobs: int) -> Iterator[SimpleQueue[Worker]]:
    """Start ``jobs`` idle workers, each with a copy of the tree. The copies are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        made = [Worker(Path(folder) / str(i)) for i in range(jobs)]
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in made:
            idle.put(worker)
        try:
            yield idle
        finally:
            for worker in made:
                worker.close()


def run_room(
    name: str, mutants: Sequence[Mutant], idle: SimpleQueue[Worker], jobs: int, *, with_baseline: bool, cpu_s: float
) -> list[Outcome]:
    """Run every mutant of a room, after its tests passed without one; ``cpu_s``: processor time for each."""
    rows = json.loads(EQUIVALENTS.read_text())
    equivalent = {tuple(row[part] for part in KEY) for row in rows}
    sources = {path: (ROOT / path).read_bytes() for path in {m.path for m in mutants}}  # the tree may change meanwhile
    tests = {path: tests_of(ROOMS[name], path, ROOT) for path in sources}
    alone: dict[str, float] = {}
    for test in sorted({test for names in tests.values() for test in names} if with_baseline else ()):
        worker = idle.get()
        answer = worker.ask([test], 600)
        idle.put(worker)
        if answer["code"] != 0:
            raise SystemExit("\n".join([f"{test} fails without a mutant", *answer["tail"]]))
        alone[test] = answer["cpu_s"]

    def one(mutant: Mutant) -> Outcome:
        names = tests[mutant.path]
        if mutant.key in equivalent:
            return Outcome(room=name, mutant=mutant, state="equivalent")
        if not names:
            return Outcome(room=name, mutant=mutant, state="untested")
        worker = idle.get()
        try:
            limit = min(cpu_s, 5 * sum(alone.get(test, 10.0) for test in names) + 10)
            source = mutant.apply(sources[mutant.path])
            answer = worker.ask(names, limit, path=mutant.path, source=source)
        finally:
            idle.put(worker)
        state = "survived" if answer["code"] == 0 else "late" if answer["is_late"] else "killed"
        print(f"survived: {mutant}" if state == "survived" else f"{state}: {mutant.path}:{mutant.line}", flush=True)
        return Outcome(room=name, mutant=mutant, state=state, cpu_s=answer["cpu_s"], tail=answer["tail"][-3:])

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, mutants))


def main() -> int:
    """Run the rooms that are asked for, and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(ROOMS), help="a room; may be given several times")
    parser.add_argument("--file", action="append", help="only mutants of this file")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="mutants drawn for each room, instead of the catalogue's")
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass without a mutant")
    parser.add_argument(
        "--cpu-s", type=float, default=60.0, help="CPU time of one mutant's tests; more is taken for a hang"
    )
    parser.add_argument("--again", type=Path, help="only what survived by this report of an earlier run")
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    parser.add_argument("--report", type=Path, help="where every outcome goes, as JSON")
    arguments = parser.parse_args()
    picked, misfits = {}, []
    for name in arguments.only or ROOMS:
        mutants, unfit = chosen(name, ROOMS[name], arguments.seed, arguments.count)
        picked[name] = [m for m in mutants if not arguments.file or m.path in arguments.file]
        misfits += unfit
    if arguments.again:
        rows = json.loads(arguments.again.read_text())
        left = {tuple(row[part] for part in KEY) for row in rows if row["state"] == "survived"}
        picked = {name: [m for m in mutants if m.key in left] for name, mutants in picked.items()}
    if arguments.list:
        print(*(m for mutants in picked.values() for m in mutants), sep="\n")
        print({name: len(mutants) for name, mutants in picked.items()}, *misfits, sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copies are removed
    started, outcomes = time.monotonic(), []
    with workers(arguments.jobs) as idle:
        for name, mutants in picked.items():
            options = {"with_baseline": not arguments.no_baseline, "cpu_s": arguments.cpu_s}
            outcomes += run_room(name, mutants, idle, arguments.jobs, **options)
    if arguments.report:
        rows = [
            {"room": o.room, "state": o.state, "cpu_s": o.cpu_s, "tail": o.tail, **vars(o.mutant)} for o in outcomes
        ]
        arguments.report.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return summary(outcomes, misfits, time.monotonic() - started)


def summary(outcomes: Sequence[Outcome], misfits: Sequence[str], seconds: float) -> int:
    """Print counts and the share of killed mutants; return the exit status of the run."""
    is_low = False
    for name in dict.fromkeys(o.room for o in outcomes):
        states = Counter(o.state for o in outcomes if o.room == name)
        real = states.total() - states["equivalent"]
        share = (states["killed"] + states["late"]) / real if real else 1.0
        is_low = is_low or share < BAR
        print(f"{name}: {share:.1%} of {real} killed; {dict(states)}")
    print(f"{len(outcomes)} mutants in {seconds:.0f} s, {sum(o.cpu_s for o in outcomes):.0f} s of CPU time")
    for misfit in misfits:
        print(f"does not fit any more: {misfit}")
    return int(is_low or bool(misfits))


if __name__ == "__main__":
    sys.exit(main())
