"""The commands of a cell without a model: ``fake_program.py JOURNAL train CELL`` and ``… eval CELL``; CELL is a folder.

They write the files of the real commands, and note in JOURNAL when they begin and end. Files beside JOURNAL give them
orders: ``hold.<cell>``: wait until that file is gone; ``fail.<cell>``: end with the cause in it. They import nothing of
the package, so that they start fast and do not share its mistakes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path

DEADLINE_S = 120.0
SETS = ("math", "logic")
ITEMS = 40
GAIN = {"dypo": 0.5, "grpo": 0.25, "sft": 0.2}
"""Share of the items that a method gets right, in addition to those right by luck."""
STATUSES = {"stopped": 75, "out_of_memory": 71, "not_finite": 13, "done": 0}


def main() -> int:
    journal, verb, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    cell = "/".join(folder.parts[-2:])
    note(journal, f"begin {verb} {cell}")
    train(journal, folder, cell) if verb == "train" else evaluate(folder)
    note(journal, f"end {verb} {cell}")
    return 0


def train(journal: Path, folder: Path, cell: str) -> None:
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: end(run_dir, "stopped", "stopped on request"))
    deadline = time.monotonic() + DEADLINE_S
    while beside(journal, "hold", cell).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if beside(journal, "fail", cell).exists():
        end(run_dir, beside(journal, "fail", cell).read_text(), "told to fail")
    (run_dir / "hf").mkdir(exist_ok=True)
    write_status(run_dir, "done", "all steps are done")


def end(run_dir: Path, cause: str, message: str) -> None:
    write_status(run_dir, cause, message)
    os._exit(STATUSES[cause])


def write_status(run_dir: Path, cause: str, message: str) -> None:
    record = {"state": "ended", "cause": cause, "status": STATUSES[cause], "message": message}
    temporary = run_dir / "status.tmp"
    temporary.write_text(json.dumps({**record, "attempt": uuid.uuid4().hex}))
    temporary.replace(run_dir / "status.json")


def evaluate(folder: Path) -> None:
    method, seed = folder.parent.name, int(folder.name.removeprefix("seed-"))
    out = folder / "eval"
    out.mkdir(exist_ok=True)
    for name in SETS:
        lines = [record(name, f"item{i}", seed, luck(name, i, seed) < 0.2 + GAIN[method]) for i in range(ITEMS)]
        (out / f"{name}.jsonl").write_text("".join(lines))
    (out / "summary.json").write_text("{}")


def luck(*words: object) -> float:
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:4], "big") / 2**32


def record(name: str, item: str, seed: int, correct: bool) -> str:
    what = {"set": name, "item": item, "sample": 0, "seed": seed, "source": "fake", "correct": correct}
    rest = {"truncated": False, "num_tokens": 3, "response": "so it is 4", "answer": "4", "error": None}
    return json.dumps({**what, **rest}) + "\n"


def beside(journal: Path, kind: str, cell: str) -> Path:
    return journal.with_name(f"{kind}.{cell.replace('/', '.')}")


def note(journal: Path, line: str) -> None:
    with journal.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
