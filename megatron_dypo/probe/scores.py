"""Projected scores of trajectories, the data of the probe, and their file.

The score of a trajectory is v = ∇_θ Σ_t log π_θ(a_t), summed over its response tokens. The gradients of GRPO, GAL and
SFT at the first update of a batch are linear in these scores, so a random projection that keeps inner products is all
that estimates of variances and biases need.

Suffixes of the probe: N trajectories; P prompts; R repetitions (groups of one prompt under the same weights); G or k
members of a group; d dimensions of a projected score; M teachers.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from megatron_dypo.checks import require
from megatron_dypo.fs import new_file
from megatron_dypo.json_text import parse_json

FORMAT = 1
"""Version of the file's format."""
Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

_DTYPES = {
    "score_Nd": np.float32,
    "prompt_N": np.int64,
    "repeat_N": np.int64,
    "teacher_N": np.int64,
    "is_correct_N": np.bool_,
    "reward_N": np.float64,
    "length_N": np.int64,
}
_NOTES = {"format": int, "step": int, "prompt_ids": list, "teachers": list, "references": list}
_DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Projected scores of all rollouts and traces of some prompts, under the weights of one step."""

    score_Nd: NDArray[np.float32]
    """[N, d] Projection of the score; inner products are unbiased."""
    prompt_N: Integers
    """[N] Index into ``prompt_ids``."""
    repeat_N: Integers
    """[N] The repetition (group) that a rollout belongs to, from 0; −1 for a trace."""
    teacher_N: Integers
    """[N] Index into ``teachers``; −1 for a rollout."""
    is_correct_N: NDArray[np.bool_]
    reward_N: Floats
    length_N: Integers
    """[N] Response tokens."""
    log_ratio_N: Mapping[str, Floats]
    """Reference → [N] Σ_t log π_θ − log π_ref, not divided by a length. ``old`` is always there, and all zero."""
    prompt_ids: tuple[str, ...]
    teachers: tuple[str, ...]
    step: int
    """Optimizer steps that made the weights."""

    def __post_init__(self) -> None:
        _check_arrays(self)
        _check_names(self)
        _check_indices(self)


def save(scores: Scores, path: Path) -> None:
    """Write the scores as one ``.npz`` file, whole or not at all."""
    notes = {
        "format": FORMAT,
        "step": scores.step,
        "prompt_ids": scores.prompt_ids,
        "teachers": scores.teachers,
        "references": list(scores.log_ratio_N),
    }
    arrays: dict[str, Any] = {name: getattr(scores, name) for name in _DTYPES}
    arrays |= {_ratio_key(index): ratio_N for index, ratio_N in enumerate(scores.log_ratio_N.values())}
    with new_file(path) as file:
        np.savez(file, notes=np.frombuffer(json.dumps(notes).encode(), np.uint8), **arrays)


def load(path: Path) -> Scores:
    """Read a file of scores.

    Raises:
        ValueError: the file cannot be read, or breaks a rule; the message names file, field, value and rule.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except _DAMAGED as error:
        raise ValueError(f"{path}: cannot be read as a file of scores: {error}") from error
    try:
        notes = _read_notes(arrays.pop("notes", None))
        ratios = {str(name): _ratio_key(index) for index, name in enumerate(notes["references"])}
        expected = {*_DTYPES, *ratios.values()}
        require(arrays.keys() >= expected, f"missing {sorted(expected - arrays.keys())}", "must be in the file")
        require(arrays.keys() <= expected, f"unknown {sorted(arrays.keys() - expected)}", "must not be in the file")
        return Scores(
            **cast(Any, {name: arrays[name] for name in _DTYPES}),
            log_ratio_N={name: arrays[key] for name, key in ratios.items()},
            prompt_ids=tuple(notes["prompt_ids"]),
            teachers=tuple(notes["teachers"]),
            step=notes["step"],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def join(parts: Sequence[Scores]) -> Scores:
    """Concatenate the trajectories of several replicas, sorted by prompt and repetition, traces last.

    The scores are copied once.

    Raises:
        ValueError: there is no part, or the parts differ in prompts, teachers, step, references or dimensions.
    """
    require(len(parts) > 0, "parts=()", "must be at least one")
    first = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        for name in ("prompt_ids", "teachers", "step"):
            _require_equal(f"parts[{index}].{name}", getattr(part, name), getattr(first, name))
        _require_equal(f"parts[{index}]: dimensions", part.score_Nd.shape[1], first.score_Nd.shape[1])
        _require_equal(f"parts[{index}]: references", sorted(part.log_ratio_N), sorted(first.log_ratio_N))
    small = [name for name in _DTYPES if name != "score_Nd"]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in small}
    ratios = {name: np.concatenate([part.log_ratio_N[name] for part in parts]) for name in first.log_ratio_N}
    order_N = np.lexsort((joined["repeat_N"], joined["teacher_N"], joined["prompt_N"]))
    score_Nd = np.empty((len(order_N), first.score_Nd.shape[1]), np.float32)
    place_N, start = np.argsort(order_N), 0
    for part in parts:
        end = start + len(part.prompt_N)
        score_Nd[place_N[start:end]] = part.score_Nd
        start = end
    return Scores(
        **cast(Any, {name: array[order_N] for name, array in joined.items()}),
        score_Nd=score_Nd,
        log_ratio_N={name: array[order_N] for name, array in ratios.items()},
        prompt_ids=first.prompt_ids,
        teachers=first.teachers,
        step=first.step,
    )


def _require_equal(name: str, value: object, expected: object) -> None:
    if value != expected:
        raise ValueError(f"{name}: differs from that of parts[0]")


def _ratio_key(index: int) -> str:
    return f"log_ratio_{index}"


def _read_notes(array: NDArray[Any] | None) -> dict[str, Any]:
    """Decode the part of the file that is not arrays of trajectories."""
    require(array is not None, "missing 'notes'", "must be in the file")
    assert array is not None
    try:
        notes: dict[str, Any] = parse_json(array.tobytes())
    except ValueError as error:
        raise ValueError(f"notes: must be JSON: {error}") from error
    require(isinstance(notes, dict), f"notes={notes!r}", "must be a JSON object")
    require(notes.keys() == _NOTES.keys(), f"notes={sorted(notes)}", f"must have the keys {sorted(_NOTES)}")
    for name, kind in _NOTES.items():
        require(type(notes[name]) is kind, f"{name}={notes[name]!r}", f"must be of type {kind.__name__}")
    require(notes["format"] == FORMAT, f"format={notes['format']}", f"must be {FORMAT}, the format of this version")
    return notes


def _check_arrays(scores: Scores) -> None:
    shape = scores.score_Nd.shape
    require(len(shape) == 2 and shape[1] >= 1, f"score_Nd of shape {shape}", "must be [N, d]")
    arrays = {name: (getattr(scores, name), dtype) for name, dtype in _DTYPES.items()}
    arrays |= {f"log_ratio_N[{name!r}]": (array, np.float64) for name, array in scores.log_ratio_N.items()}
    for name, (array, dtype) in arrays.items():
        require(array.dtype == dtype, f"{name} of type {array.dtype}", f"must be {np.dtype(dtype)}")
        expected = shape if name == "score_Nd" else shape[:1]
        require(array.shape == expected, f"{name} of shape {array.shape}", f"must be {expected}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            at = tuple(int(index) for index in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"{name}[{', '.join(map(str, at))}]={array[at]}: must be finite")
    require("old" in scores.log_ratio_N, f"log_ratio_N of {sorted(scores.log_ratio_N)}", "must contain 'old'")
    require(not scores.log_ratio_N["old"].any(), "log_ratio_N['old']", "must be zero: the weights are those of π_old")


def _check_names(scores: Scores) -> None:
    for name in ("prompt_ids", "teachers"):
        names = getattr(scores, name)
        require(all(isinstance(one, str) for one in names), f"{name}={names[:3]}…", "must be texts")
        require(len(set(names)) == len(names), f"{name}={names[:3]}…", "must not have one twice")
    require(type(scores.step) is int and scores.step >= 0, f"step={scores.step}", "must be an integer from 0")


def _check_indices(scores: Scores) -> None:
    _require_range("prompt_N", scores.prompt_N, 0, len(scores.prompt_ids) - 1)
    _require_range("teacher_N", scores.teacher_N, -1, len(scores.teachers) - 1)
    _require_range("repeat_N", scores.repeat_N, -1, None)
    _require_range("length_N", scores.length_N, 0, None)
    wrong_N = (scores.teacher_N >= 0) != (scores.repeat_N == -1)
    if wrong_N.any():
        at = int(wrong_N.argmax())
        values = f"teacher_N[{at}]={scores.teacher_N[at]}, repeat_N[{at}]={scores.repeat_N[at]}"
        raise ValueError(f"{values}: exactly one must be −1: a trajectory is a rollout or a trace")


def _require_range(name: str, array_N: Integers, low: int, high: int | None) -> None:
    outside_N = (array_N < low) | (array_N > high if high is not None else False)
    if outside_N.any():
        at = int(outside_N.argmax())
        rule = f"must be at least {low}" if high is None else f"must be in {low}..{high}"
        raise ValueError(f"{name}[{at}]={array_N[at]}: {rule}")
