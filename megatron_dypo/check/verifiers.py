"""Verifiers on rows of the data: gold answers, and responses that no verifier should accept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_dypo.check.report import VerifierFacts
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.tokenising import make_prompt, render_prompt
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.grading.naming import verifier_of
from megatron_dypo.grading.pairs import pair_of
from megatron_dypo.grading.trial import try_verifier
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.types import Prompt

_TRIED_ROWS = 20
"""Rows that are tried for each verifier and source."""
_MAX_KINDS = 50
"""Most pairs of a verifier and a source that are tried; the others are only counted."""
_CONSTANT = "I do not know."
_ACCEPTS_EMPTY = ": it accepts an empty response: "
"""The words of ``try_verifier`` for this case. Such rows are counted separately."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The rows of the training files or of an evaluation set, and what decides their verifiers."""

    name: str
    """``data.prompts`` or ``eval.sets.<set>``."""
    dataset: PromptDataset
    data: DataConfig
    grading: GradingConfig
    verifier: str | None = None
    """Verifier of the rows that name none; None: it follows from the source."""
    limit: int | None = None
    """Rows that are used, from the first; None: all."""


def try_verifiers(trial: Trial, verifier: Verifier, tokenizer: Tokenizer, found: Findings) -> list[VerifierFacts]:
    """Try each verifier of the rows on up to 20 of each source; what is odd becomes a note.

    Args:
        verifier: running, with all that the rows name.
    """
    kinds = _kinds(trial)
    tried = [
        _Tried(kind=kind, prompts=_prompts(trial, tokenizer, kind.rows) if index < _MAX_KINDS else [])
        for index, kind in enumerate(kinds)
    ]
    complaints = try_verifier(verifier, trial.grading, [prompt for each in tried for prompt in each.prompts])
    return [_facts(each, trial, verifier, complaints, found) for each in tried]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    verifier: str
    source: str
    num_rows: int
    rows: list[int]
    """Numbers of the rows that are tried."""


@dataclass(frozen=True, kw_only=True)
class _Tried:
    kind: _Kind
    prompts: list[Prompt]


def _kinds(trial: Trial) -> list[_Kind]:
    """Group the rows by verifier and source; of each, rows from all over the files are tried."""
    checked, numbers = trial.dataset.checked, trial.dataset.numbers[: trial.limit]
    rows: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    pairs = np.stack([checked.verifier[numbers], checked.source[numbers]], axis=1)
    for own, source in np.unique(pairs, axis=0):
        name = trial.verifier if own < 0 else checked.verifiers[own]
        verifier = verifier_of(trial.grading, own=name, source=checked.sources[source])
        rows[verifier, checked.sources[source]].append(np.flatnonzero((pairs == (own, source)).all(axis=1)))
    kinds = []
    for (verifier, source), parts in sorted(rows.items()):
        every = np.sort(np.concatenate(parts))
        chosen = np.unique(np.linspace(0, len(every) - 1, min(_TRIED_ROWS, len(every))).astype(int))
        kinds.append(_Kind(verifier=verifier, source=source, num_rows=len(every), rows=every[chosen].tolist()))
    return kinds


def _prompts(trial: Trial, tokenizer: Tokenizer, rows: Sequence[int]) -> list[Prompt]:
    prompts = []
    for number in rows:
        row = trial.dataset[number]
        tokens = render_prompt(row.prompt, tokenizer, trial.data)
        prompt = make_prompt(row, tokens, tokenizer, visit=0, order=number, traces={})
        prompts.append(replace(prompt, verifier=row.verifier or trial.verifier))
    return prompts


def _facts(tried: _Tried, trial: Trial, verifier: Verifier, complaints: list[str], found: Findings) -> VerifierFacts:
    kind, prompts = tried.kind, tried.prompts
    own = [next((text for text in complaints if text.startswith(f"prompt {p.prompt_id}, ")), None) for p in prompts]
    of_gold = [text for text in own if text is not None and _ACCEPTS_EMPTY not in text]
    facts = VerifierFacts(
        rows=trial.name,
        verifier=kind.verifier,
        source=kind.source,
        num_rows=kind.num_rows,
        num_tried=len(prompts),
        num_gold=len(prompts) - len(of_gold),
        num_empty=_accepted(verifier, [(prompt, "") for prompt in prompts]),
        num_constant=_accepted(verifier, [(prompt, _CONSTANT) for prompt in prompts]),
        num_other=_accepted(verifier, _with_other_answers(prompts)),
    )
    if of_gold:
        found.notes.append(
            f"{_named(facts)}: {len(of_gold)} of {len(prompts)} rows tried have an answer that it does not "
            f"accept; {of_gold[0]}"
        )
    found.notes += _odd(facts, prompts)
    return facts


def _odd(facts: VerifierFacts, prompts: Sequence[Prompt]) -> list[str]:
    """Say what a verifier accepts that none should."""
    name = _named(facts)
    notes = []
    if facts.num_empty:
        notes.append(f"{name}: it accepts an empty response on {facts.num_empty} of {facts.num_tried} rows tried")
    # With a single answer, a constant response may be right.
    if len({repr(prompt.answer) for prompt in prompts}) < 2:
        return notes
    if facts.num_constant == facts.num_tried:
        notes.append(
            f"{name}: it accepts {_CONSTANT!r} on each of {facts.num_tried} rows tried: every prompt would be Easy"
        )
    if facts.num_other == facts.num_tried:
        notes.append(f"{name}: it accepts another row's answer on each of {facts.num_tried} rows tried")
    return notes


def _with_other_answers(prompts: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
    pairs = []
    for index, prompt in enumerate(prompts):
        later = [*prompts[index + 1 :], *prompts[:index]]
        other = next((p.answer for p in later if isinstance(p.answer, str) and p.answer != prompt.answer), None)
        if other is not None:
            pairs.append((prompt, f"\\boxed{{{other}}}"))
    return pairs


def _accepted(verifier: Verifier, pairs: Sequence[tuple[Prompt, str]]) -> int:
    verdicts = verifier.verify([pair_of(prompt, response) for prompt, response in pairs])
    return sum(verdict.is_correct and verdict.error is None for verdict in verdicts)


def _named(facts: VerifierFacts) -> str:
    return f"{facts.rows}: verifier {facts.verifier}, source {facts.source!r}"
