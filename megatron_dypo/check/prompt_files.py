"""Prompt files in a dry run: small files are checked whole, large files at both ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_dypo.check.ends import Ends, look_at_ends
from megatron_dypo.check.lengths import Longest
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.grading import BUILT_IN_VERIFIERS
from megatron_dypo.config.tree import Config
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.prompts import PromptStream
from megatron_dypo.data.source import distinct_names
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.eval.judging import check_rows, grading_of_sets
from megatron_dypo.eval.prompts import EvalSet, held_out_data
from megatron_dypo.grading.naming import row_verifier_problem, unused_sources, verifier_of
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.objective.recipes.registry import build_objective

WHOLE_BYTES = 2**20
"""Largest total size, in bytes, of a set's files that are checked whole. It takes about a second."""
_SHOWN_ROWS = 5


def check_prompt_files(config: Config, tokenizer: Tokenizer | None, found: Findings) -> Longest:
    """Check the prompt files and evaluation sets that are there; without a tokenizer nothing is rendered or counted."""
    prompt, trace = _check_training(config, tokenizer, found)
    held_out = [_check_eval_set(name, config, tokenizer, found) for name in config.eval.sets]
    is_whole = all(longest is not None for longest in held_out)
    return Longest(prompt=prompt, trace=trace, held_out=max(filter(None, held_out), default=0) if is_whole else None)


def check_dataset(config: Config, dataset: PromptDataset, tokenizer: Tokenizer, found: Findings) -> None:
    """Check the names in the config against the rows of the prompt files: teachers, verifiers, sources, answers."""
    with found.noting():
        PromptStream(dataset, tokenizer, config.data, config.run.seed)  # checks the rules of the stream
    with contextlib.suppress(ValueError):  # an objective that cannot be built is already a problem
        if not dataset.teachers and not build_objective(config.objective).needs_rollouts(0):
            found.problems.append(
                f"objective.name={config.objective.name}: begins with teachers' traces, and no row of the "
                "prompt files has one"
            )
    problems = [
        problem for name in sorted(dataset.verifiers) if (problem := row_verifier_problem(config.grading, name))
    ]
    found.problems += problems
    if problems:
        return
    with found.noting():
        dataset.require_text_answers(
            lambda own, source: verifier_of(config.grading, own=own, source=source) not in BUILT_IN_VERIFIERS
        )


def _check_training(config: Config, tokenizer: Tokenizer | None, found: Findings) -> tuple[int | None, int | None]:
    """Check the training files; return their longest prompt and trace that are used, None where not every row was
    looked at."""
    present = _small_files("", config.data.prompts, config.data, tokenizer, found, held_out=False)
    with found.noting(), contextlib.ExitStack() as stack:
        if not present:
            return None, None
        dataset = stack.enter_context(contextlib.closing(PromptDataset(present, data=config.data, tokenizer=tokenizer)))
        if tokenizer is not None and len(present) == len(config.data.prompts):
            check_dataset(config, dataset, tokenizer, found)
            found.notes += unused_sources(config.grading, dataset.sources)
        if tokenizer is not None:
            return longest_used(dataset, config.data)
    return None, None


def _check_eval_set(name: str, config: Config, tokenizer: Tokenizer | None, found: Findings) -> int | None:
    """Check an evaluation set, and its rows against their verifiers; return its longest prompt as above."""
    key, settings = f"eval.sets.{name}", config.eval.settings(name)
    data = held_out_data(config.data, settings)
    with found.noting(key), contextlib.ExitStack() as stack:
        if not _small_files(key, [settings.path], data, tokenizer, found, held_out=True):
            return None
        one = EvalSet(name, config.eval, config.data, tokenizer, seed=config.run.seed)
        stack.enter_context(contextlib.closing(one))
        check_rows(one, grading_of_sets(config.grading, config.eval))
        if tokenizer is not None:
            return longest_used(one.dataset, data)[0]
    return None


def _small_files(
    key: str, paths: Sequence[str], data: DataConfig, tokenizer: Tokenizer | None, found: Findings, *, held_out: bool
) -> list[Path]:
    """Return the files of a set that are there, to be checked whole; of large ones check the ends and return []."""
    present = [Path(path) for path in paths if os.path.lexists(path)]  # others are noted as missing
    if sum(path.stat().st_size for path in present if path.is_file()) <= WHOLE_BYTES:
        return present
    _check_ends(key, present, data, tokenizer, found, held_out=held_out)
    return []


def longest_used(dataset: PromptDataset, data: DataConfig) -> tuple[int, int]:
    """Return the tokens of the longest prompt and of the longest trace within the limits; 0 if there is none."""
    prompts, traces = dataset.checked.prompt_tokens, dataset.checked.trace_tokens
    return (
        int(prompts[prompts <= data.max_prompt_tokens].max(initial=0)),
        int(traces[traces <= data.max_trace_tokens].max(initial=0)),
    )


def _check_ends(
    key: str,
    paths: Sequence[Path],
    data: DataConfig,
    tokenizer: Tokenizer | None,
    found: Findings,
    *,
    held_out: bool,
) -> None:
    teachers, columns = set[str](), set[str]()
    is_read = True
    for path, name in zip(paths, distinct_names(list(paths)), strict=True):
        ends = None
        with found.noting(key):
            ends = look_at_ends(path, name, data, tokenizer, held_out=held_out)
        if ends is None:
            is_read = False
            continue
        teachers |= ends.teachers
        columns |= ends.columns
        bad = [f"{place}: {problem}" for place, problems in ends.problems.items() for problem in problems]
        shown = bad[:_SHOWN_ROWS] + ([f"{path}: and {len(bad) - _SHOWN_ROWS} more"] if len(bad) > _SHOWN_ROWS else [])
        # With on_bad_row=skip, the run itself reports how many rows it skips.
        target = found.problems if data.on_bad_row == "error" or ends.num_rows == len(ends.problems) else found.notes
        target += [f"{key}: {line}" if key else line for line in shown]
        _note_long_prompts(path, ends, data, found)
    if is_read and not held_out:
        found.notes += _unknown_names(data, teachers, columns)


def _unknown_names(data: DataConfig, teachers: set[str], columns: set[str]) -> list[str]:
    """Name the columns and teachers of the config that no checked row has; other rows may have them."""
    notes = [
        f"data.fields.{option.name}={name}: no row at the ends of the prompt files has such a field"
        for option in fields(data.fields)
        for name in _as_names(getattr(data.fields, option.name))
        if name not in columns
    ]
    unknown = sorted(set(data.teachers or ()) - teachers)
    if unknown:
        known = ", ".join(sorted(teachers)) or "none"
        notes.append(
            f"data.teachers={unknown}: no row at the ends of the prompt files has a trace of theirs; the "
            f"teachers there are {known}"
        )
    return notes


def _as_names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value or ()
    return tuple(name for name in names if name)


def _note_long_prompts(path: Path, ends: Ends, data: DataConfig, found: Findings) -> None:
    counts = ends.prompt_tokens
    if counts and min(counts) > data.max_prompt_tokens:
        found.notes.append(
            f"{path}: each of the {len(counts)} prompts looked at is longer than data.max_prompt_tokens="
            f"{data.max_prompt_tokens}: the shortest has {min(counts)} tokens"
        )
