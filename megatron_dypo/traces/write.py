"""Write the rows of a prompt file again, each with the teachers' right responses to its prompt as traces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dypo.data.rows import PromptRow
from megatron_dypo.fs import new_file
from megatron_dypo.metrics.progress import progress
from megatron_dypo.traces.ledger import Ledger, text_hash
from megatron_dypo.traces.tasks import Tasks


def write_rows(path: Path, tasks: Tasks, ledgers: Mapping[str, Ledger], *, show_progress: bool) -> dict[str, int]:
    """Write every row of the prompt file with its traces to ``path``; on an error, write nothing.

    A row keeps its other columns and the traces that it has. A text that the row has already (white space aside) is not
    added under another teacher's name: it would be drawn twice as often.

    Returns:
        Teacher → number of traces that were left out for this reason.
    """
    source, left_out = tasks.source, dict.fromkeys(ledgers, 0)
    with new_file(path) as file, progress(len(source), "writing rows", "rows", enabled=show_progress) as bar:
        for index in range(len(source)):
            row = source.row(index)
            traces = dict(row.traces)
            seen = {text_hash(text) for text in traces.values()}
            for name, ledger in ledgers.items():
                own = [] if name in row.traces else ledger.kept(tasks.of_row(index))
                new = [text for text in own if text_hash(text) not in seen]
                left_out[name] += len(own) - len(new)
                seen.update(map(text_hash, new))
                traces |= {trace_name(name, place): text for place, text in enumerate(new)}
            line = json.dumps(_fields(row, source.file_and_line(index), traces), ensure_ascii=False)
            file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            bar.update(1)
    return left_out


def trace_name(teacher: str, place: int) -> str:
    """Return the name of a teacher's trace: the teacher's for the first of a prompt, ``NAME#2`` for the second."""
    return teacher if place == 0 else f"{teacher}#{place + 1}"


def _fields(row: PromptRow, place: tuple[Path, int], traces: Mapping[str, str]) -> dict[str, Any]:
    """Return a row under the column names of the format ``plain``, without an id that only says file and line."""
    path, line = place
    named = {"prompt": row.prompt, "answer": row.answer, "source": row.source}
    if row.prompt_id != f"{path.name}:{line}":
        named = {"id": row.prompt_id, **named}
    if row.verifier is not None:
        named["verifier"] = row.verifier
    rest = {key: value for key, value in row.row.items() if key not in (*named, "id", "verifier", "traces")}
    return {**named, **({"traces": dict(traces)} if traces else {}), **rest}
