"""The long lists of a server's answer, read as arrays without a Python object for each number.

SGLang writes the tokens of a response as ``"output_ids":[5,7]`` and their log-probs as rows
``"output_token_logprobs":[[-0.5,5,null],[-1.25,7,null]]``. These lists are nearly all of an answer. They are cut out of
its bytes and converted by Arrow, which releases the GIL. The rest is read as JSON. (SGLang 0.5.23 has binary log-probs
for the likeliest tokens of a place only, ``return_flat_raw_top_logprobs_b64``, not for the token that was sampled.)

The base64 in ``"routed_experts":"AAAA"`` may be a hundred times as long as both. It is cut out too, without a copy:
``json.loads`` would hold the GIL for a tenth of a second for each 100 MB.

A list or text is cut out only if it is written as above. All others stay in the JSON, so that the reader of the answer
sees each of them as ``json.loads`` gives it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.csv

_LONG = re.compile(rb'"(output_ids|output_token_logprobs|routed_experts)":[\["]')
_ROWS_END = re.compile(rb"\]\]")
_LARGEST_ID = 2**31 - 1
_PIECE = 2**22
"""Bytes of a text that are searched at a time, half a millisecond."""
_ROW = b"[,,],"
"""Brackets and commas of one row, and the comma before the next."""
_BRACKETS_TO_LINES = bytes.maketrans(b"[]", b" \n")
_READING = pyarrow.csv.ReadOptions(use_threads=False, block_size=2**30, column_names=["before", "logp", "ids", "text"])
_PARSING = pyarrow.csv.ParseOptions(quote_char=False, ignore_empty_lines=False)
_CONVERTING = pyarrow.csv.ConvertOptions(
    check_utf8=False,
    column_types={"logp": pyarrow.float64(), "ids": pyarrow.int64()},
    include_columns=["logp", "ids"],
    null_values=[],
)
_OPEN, _CLOSE, _COMMA, _MINUS, _POINT, _ZERO, _QUOTE = b'[],-.0"'


@dataclass(frozen=True, kw_only=True, eq=False)
class LogprobRows:
    """The log-probs of R tokens and the ids of these tokens."""

    logp: npt.NDArray[np.float64]
    """[R] Finite."""
    ids: npt.NDArray[np.int64]
    """[R] In [0, 2³¹)."""

    def __len__(self) -> int:
        return len(self.ids)


def read_columns(body: bytes) -> Any:
    """Read the JSON of an answer, with arrays in place of lists of tokens and of their log-probs.

    In each response of the answer ``output_ids`` is an array of int64 and ``output_token_logprobs`` of ``meta_info`` a
    :class:`LogprobRows`, if the lists are written as SGLang writes them. ``routed_experts`` of ``meta_info`` is a
    memoryview of the bytes of a text without escapes; nobody has looked at its characters yet. All else is as
    ``json.loads`` gives it.

    Raises:
        ValueError, RecursionError: the answer is not JSON.
    """
    mark = secrets.token_hex(16)  # a server that does not know it cannot write what stands for a list
    kept, found = [], dict[str, Any]()
    start = position = 0
    while match := _LONG.search(body, position):
        position, value = match.end(), None
        if (body[position - 1] == _QUOTE) is (match[1] == b"routed_experts"):
            position, value = _READERS[match[1]](body, position)
        if value is not None:
            name = f"{mark}:{len(found)}"
            found[name] = value
            kept += [body[start : match.end() - 1], f'"{name}"'.encode()]
            start = position
    payload = json.loads(b"".join([*kept, body[start:]]))
    for output in payload if isinstance(payload, list) else [payload]:
        if isinstance(output, dict):
            _fill_in(output, "output_ids", found)
            if isinstance(meta := output.get("meta_info"), dict):
                _fill_in(meta, "output_token_logprobs", found)
                _fill_in(meta, "routed_experts", found)
    return payload


def _fill_in(fields: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    if isinstance(value := fields.get(name), str) and value in found:
        fields[name] = found[value]


def _read_ids(body: bytes, start: int) -> tuple[int, npt.NDArray[np.int64] | None]:
    """Read a list of integers in [0, 2³¹) whose first item is at ``start``.

    Returns:
        The end of the list, and its integers; ``start`` and None if it is another list.
    """
    end = body.find(b"]", start)
    text = body[start:end]
    if end <= start or text.translate(None, b"0123456789,"):
        return start, None
    digits = np.frombuffer(text, np.uint8)
    commas = np.flatnonzero(digits == _COMMA)
    starts, ends = np.append(0, commas + 1), np.append(commas, len(text))
    if (ends == starts).any() or not _have_no_leading_zero(digits, starts, ends):
        return start, None
    ids = np.fromstring(text, np.int64, sep=",")
    return (end + 1, ids) if ids.max() <= _LARGEST_ID else (start, None)


def _read_rows(body: bytes, start: int) -> tuple[int, LogprobRows | None]:
    """Read a list of rows (log-prob, token id, null) whose first row is at ``start``.

    Returns:
        The end of the list, and its rows; ``start`` and None if it is another list.
    """
    last = _ROWS_END.search(body, start)
    text = body[start : last.start() + 1] if last else b""
    if last is None or text.translate(None, b"0123456789.,-e[]nul") or not _are_rows(np.frombuffer(text, np.uint8)):
        return start, None
    table = _read_csv(b"," + text.translate(_BRACKETS_TO_LINES))  # a row is now: comma, numbers, null, line break
    if table is None:
        return start, None
    logp, ids = table.column("logp").to_numpy(), table.column("ids").to_numpy()
    is_sound = ids.min() >= 0 and ids.max() <= _LARGEST_ID and np.isfinite(logp).all()
    return (last.end(), LogprobRows(logp=logp, ids=ids)) if is_sound else (start, None)


def _read_text(body: bytes, start: int) -> tuple[int, memoryview | None]:
    """Find a text without escapes whose first character is at ``start``.

    Returns:
        The end of the text, its quotation mark included, and its bytes; ``start`` and None if it is another text.
    """
    for first in range(start, len(body), _PIECE):  # other threads may run in between
        end = body.find(b'"', first, first + _PIECE)
        if body.find(b"\\", first, end if end >= 0 else first + _PIECE) >= 0:
            break
        if end >= 0:
            return end + 1, memoryview(body)[start:end]
    return start, None


_READERS: dict[bytes, Callable[[bytes, int], tuple[int, Any]]] = {
    b"output_ids": _read_ids,
    b"output_token_logprobs": _read_rows,
    b"routed_experts": _read_text,
}


def _are_rows(text: npt.NDArray[np.uint8]) -> bool:
    """Tell whether a text is rows of two items and ``null``, with no number that only Arrow takes for one.

    Arrow reads ``.5``, ``5.`` and ``05``. None of them is JSON.
    """
    signs = np.flatnonzero((text == _OPEN) | (text == _CLOSE) | (text == _COMMA))
    rows = (len(signs) + 1) // len(_ROW)
    if signs[0] != 0 or text[signs].tobytes() != (_ROW * rows)[:-1]:
        return False
    opened, first_ends, id_ends, closed = (signs[place :: len(_ROW)] for place in range(4))
    is_null = closed - id_ends == 5
    for place, letter in enumerate(b"null", start=1):
        is_null &= text[np.minimum(id_ends + place, closed)] == letter
    points = np.flatnonzero(text == _POINT)
    is_between = _is_digit(text[points - 1]) & _is_digit(text[points + 1])
    is_next = signs[4 :: len(_ROW)] == closed[:-1] + 1
    return bool(
        is_null.all()
        and is_between.all()
        and is_next.all()
        and (opened[1:] == signs[4 :: len(_ROW)] + 1).all()
        and _have_no_leading_zero(text, opened + 1, first_ends)
        and _have_no_leading_zero(text, first_ends + 1, id_ends)
    )


def _have_no_leading_zero(
    text: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> bool:
    """Tell whether no number from one of ``starts`` to its end has a digit behind a zero at its beginning."""
    starts = starts + (text[np.minimum(starts, ends - 1)] == _MINUS)
    behind = np.minimum(starts + 1, len(text) - 1)
    is_zero = text[np.minimum(starts, len(text) - 1)] == _ZERO
    return not (is_zero & (starts + 1 < ends) & _is_digit(text[behind])).any()


def _is_digit(text: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return (text - np.uint8(_ZERO)) < 10


def _read_csv(text: bytes) -> pyarrow.Table | None:
    """Read the columns ``logp`` and ``ids`` of lines; None if one of them has anything else than numbers there."""
    try:
        return pyarrow.csv.read_csv(pyarrow.py_buffer(text), _READING, _PARSING, _CONVERTING)
    except pyarrow.ArrowInvalid:
        return None
