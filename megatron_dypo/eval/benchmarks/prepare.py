"""Convert a published file to a prompt file of this package. On an error, no file is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dypo.config.words import counted
from megatron_dypo.data.files import require_output
from megatron_dypo.data.formats import FORMATS
from megatron_dypo.data.problems import Problems
from megatron_dypo.data.rows import BadRow, parse_row
from megatron_dypo.data.values import shown
from megatron_dypo.eval.benchmarks.readers import Question
from megatron_dypo.eval.benchmarks.sets import BENCHMARKS, Benchmark
from megatron_dypo.eval.benchmarks.tables import read_table
from megatron_dypo.fs import new_file


def prepare_set(name: str, path: Path, out: Path, *, instruction: str = "", is_part: bool = False) -> int:
    """Write the rows of a published file as JSONL with ``id``, ``prompt``, ``answer``, ``source``, ``verifier``.

    A row of multiple choice also has ``options``.

    Args:
        name: name of the set, a key of ``BENCHMARKS``.
        instruction: text to put after each prompt, for example where to write the answer.
        is_part: whether the file may have another number of rows than the published files.

    Returns:
        The number of rows written.

    Raises:
        ValueError: the file cannot be read or is of another set, or rows break rules. The message names each bad row
            with file, line, field, value and rule.
    """
    benchmark = _benchmark(name)
    require_output(out, path, "the published file")
    rows = _rows(name, benchmark, path, instruction)
    sizes = " or ".join(map(str, benchmark.rows))
    if not is_part and len(rows) not in benchmark.rows:
        raise ValueError(
            f"{path}: has {counted(len(rows), 'row')}, and {name} ({benchmark.title}) has {sizes}: a file of another "
            "set, or a part of it (--part)"
        )
    with new_file(out) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    return len(rows)


def _benchmark(name: str) -> Benchmark:
    if name == "amc" or name == "amc23":
        raise ValueError(f"set={name!r}: two sets are called AMC: amc23_83 and amc23_40")
    if name not in BENCHMARKS:
        raise ValueError(f"set={name!r}: must be one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _rows(name: str, benchmark: Benchmark, path: Path, instruction: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    problems = Problems()
    places: dict[str, str] = {}
    for number, (place, record) in enumerate(read_table(path)):
        try:
            if isinstance(record, BadRow):
                raise record
            if not isinstance(record, dict):
                raise BadRow(f"{shown(record)}: must be an object")
            row = _row(name, benchmark, benchmark.read(record), number, instruction)
            first = places.setdefault(row["id"], place)
            if first != place:
                raise BadRow(f"id={shown(row['id'])}: is that of {first} too")
            rows.append(row)
        except BadRow as bad:
            problems.add(f"  {place}: {bad}")
    if problems:
        head = f"{counted(len(problems), 'row')} of {path} cannot be one of {name} ({benchmark.columns}):"
        raise ValueError(problems.under(head))
    return rows


def _row(name: str, benchmark: Benchmark, question: Question, number: int, instruction: str) -> dict[str, Any]:
    prompt = f"{question.prompt}\n\n{instruction}" if instruction else question.prompt
    row: dict[str, Any] = {
        "id": f"{name}-{number if question.id is None else question.id}",
        "prompt": prompt,
        "answer": question.answer,
        "source": name,
        "verifier": benchmark.verifier,
    }
    if question.options:
        row["options"] = list(question.options)
    parse_row(row, FORMATS["plain"], default_id="", default_source="")
    return row
