"""The commands of a cell without a model: ``fake_program.py JOURNAL train CONFIG`` and ``… eval CONFIG OUT``.

They read and write the files that the real ones do, and note in JOURNAL when they begin and end. Files beside JOURNAL say
what they are to do: ``hold.<cell>``: wait until that file is gone; ``fail.<cell>``: end with the status in it.
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

import yaml

from megatron_dypo.ending import Cause, RunEnded, cause_of_status
from megatron_dypo.eval.records import SUMMARY_FILE, Record, RecordFile
from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.status import RunStatus

DEADLINE_S = 120.0
ITEMS = 40
GAIN = {"dypo": 0.5, "grpo": 0.25, "sft": 0.2, "sft_then_rl": 0.2}
"""Share of the items that a method gets right beyond luck, by its objective."""


def main() -> int:
    journal, verb, config_path = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    config = yaml.safe_load(config_path.read_text())
    cell = "/".join(config_path.parent.parts[-2:])
    note(journal, f"begin {verb} {cell}")
    if verb == "train":
        train(journal, config, cell)
    else:
        evaluate(config, Path(sys.argv[4]))
    note(journal, f"end {verb} {cell}")
    return 0


def train(journal: Path, config: dict, cell: str) -> None:
    run_dir = Path(config["run"]["dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    status = RunStatus(run_dir, uuid.uuid4().hex, rank=0)
    status.open()
    signal.signal(signal.SIGTERM, lambda *_: end(status, Cause.STOPPED, "stopped on request"))
    deadline = time.monotonic() + DEADLINE_S
    while beside(journal, "hold", cell).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if beside(journal, "fail", cell).exists():
        cause = cause_of_status(int(beside(journal, "fail", cell).read_text()))
        assert cause is not None
        end(status, cause, "told to fail")
    (run_dir / "hf").mkdir(exist_ok=True)
    status.end(Cause.DONE, "all steps are done")


def end(status: RunStatus, cause: Cause, message: str) -> None:
    status.end(cause, message)
    print(f"megatron-dypo: error: {RunEnded(cause, message)}", file=sys.stderr, flush=True)
    os._exit(cause.status)


def evaluate(config: dict, out: Path) -> None:
    seed, gain = config["run"]["seed"], GAIN[config["objective"]["name"]]
    for name in config["eval"][SETS_KEY]:
        with RecordFile(out, name, {"seed": seed}) as file:
            file.append(
                [record(name, f"item{item}", seed, luck(name, item, seed) < 0.2 + gain) for item in range(ITEMS)]
            )
    replace_file(out / SUMMARY_FILE, json.dumps({"sets": {}}))


SETS_KEY = "prompts"


def luck(*words: object) -> float:
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:4], "big") / 2**32


def record(name: str, item: str, seed: int, correct: bool) -> Record:
    return Record(
        set=name,
        item=item,
        sample=0,
        seed=seed,
        source="fake",
        correct=correct,
        truncated=False,
        num_tokens=3,
        response="so it is 4",
        answer="4",
    )


def beside(journal: Path, kind: str, cell: str) -> Path:
    return journal.with_name(f"{kind}.{cell.replace('/', '.')}")


def note(journal: Path, line: str) -> None:
    with journal.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
