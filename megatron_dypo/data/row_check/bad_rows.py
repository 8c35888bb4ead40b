"""Reports of bad rows for people: the first ones in an error, all of them in a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_dypo.config.words import counted
from megatron_dypo.data.source import RowSource
from megatron_dypo.fs import replace_file
from megatron_dypo.json_text import parse_json

log = logging.getLogger(__name__)

BAD_ROWS_FILE = "bad_rows.jsonl"
_SHOWN_ROWS = 20


def settle_bad_rows(
    problems: Mapping[int, Sequence[str]],
    source: RowSource,
    on_bad_row: Literal["error", "skip"],
    folder: Path | None,
) -> None:
    """Raise one ValueError that lists bad rows, or note in ``folder`` and in the log that they are left out.

    If all rows are bad, it is an error in any case.
    """
    if folder is not None:
        _write(folder / BAD_ROWS_FILE, problems, source)
    if not problems:
        return
    count, total = len(problems), len(source)
    if on_bad_row == "error":
        raise ValueError(f"{counted(count, 'bad row')} in the prompt files:\n{_listed(problems, source)}")
    if count == total:
        raise ValueError(f"each of the {total} rows in the prompt files is bad:\n{_listed(problems, source)}")
    where = f"listed in {folder / BAD_ROWS_FILE}" if folder is not None else f"the first:\n{_listed(problems, source)}"
    log.warning("data.on_bad_row=skip: %d of %d rows are bad and left out; %s", count, total, where)


def _listed(problems: Mapping[int, Sequence[str]], source: RowSource) -> str:
    rows = list(problems)[:_SHOWN_ROWS]
    lines = [f"  {source.place(row)}: {problem}" for row in rows for problem in problems[row]]
    rest = len(problems) - len(rows)
    return "\n".join([*lines, *([f"  and {rest} more"] if rest else [])])


def _write(path: Path, problems: Mapping[int, Sequence[str]], source: RowSource) -> None:
    """Write the bad rows of these files, and keep those of others (a run opens several data sets)."""
    ours = {str(file.path) for file in source.files}
    lines = _lines_of_others(path, ours)
    for row, found in problems.items():
        file, line = source.file_and_line(row)
        lines.append(json.dumps({"file": str(file), "line": line, "problems": list(found)}))
    if not lines:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(f"{line}\n" for line in lines))


def _lines_of_others(path: Path, ours: set[str]) -> list[str]:
    kept = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            if parse_json(line)["file"] not in ours:
                kept.append(line.decode())
        except (ValueError, TypeError, KeyError):
            log.warning("%s has a line of an unknown form: %.80r is left out", path, line)
    return kept
