"""The evaluation of a cell: take the responses that its run gave after its last step. Nothing is sampled again.

    python examples/tiny_study/records.py CELL

``megatron-dypo compare`` calls this in place of ``megatron-dypo eval``, which would start a server for each cell. The
run has asked and judged by the same code (:mod:`megatron_dypo.loop.evaluate`); its samples become the records that
``eval`` writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.eval.prompts import response_seed
from megatron_dypo.eval.records import SUMMARY_FILE, Record, records_path
from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.samples import eval_folder


def take_records(cell: Path) -> dict[str, int]:
    """Write the records of every evaluation set of a cell; return the number of responses to each.

    Raises:
        ValueError: the run has no samples of its last step for a set.
    """
    config = load_config(cell / "config.yaml")
    counts: dict[str, int] = {}
    for name in config.eval.sets:
        path = Path(config.run.dir) / eval_folder(name) / f"step_{config.run.steps:06d}.jsonl"
        if not path.is_file():
            raise ValueError(f"{path}: no such file: the run has not evaluated {name!r} after its last step")
        records = [record for row in _rows(path) for record in records_of_row(name, row, config.run.seed)]
        text = "".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in records)
        target = records_path(cell / "eval", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, text.encode("utf-8", "backslashreplace"))
        counts[name] = len(records)
    replace_file(cell / "eval" / SUMMARY_FILE, json.dumps({"responses": counts}) + "\n")
    return counts


def records_of_row(name: str, row: Mapping[str, Any], seed: int) -> Iterator[Record]:
    """Yield the records of one row of samples: one for each response to the prompt."""
    for sample, rollout in enumerate(row["rollouts"]):
        yield Record(
            set=name,
            item=row["prompt_id"],
            sample=sample,
            seed=response_seed(seed, row["prompt_id"], sample),
            source=row["source"],
            correct=rollout["is_correct"] if rollout["error"] is None else None,
            truncated=rollout["finish"] == "length",
            num_tokens=rollout["num_tokens"],
            response=rollout["text"],
            answer=None,
            error=rollout["error"],
        )


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


if __name__ == "__main__":
    try:
        print(take_records(Path(sys.argv[1])))
    except ValueError as error:
        sys.exit(f"error: {error}")
