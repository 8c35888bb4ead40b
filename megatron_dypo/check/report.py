"""The findings of ``megatron-dypo check``, as data, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_dypo.config.words import counted
from megatron_dypo.data.statistics import PromptStatistics, TeacherStatistics
from megatron_dypo.data.teacher_table import render_teachers
from megatron_dypo.data.values import printable

_SHOWN_IDS = 48
_SHOWN_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The policy and its tokenizer."""

    family: str
    num_parameters: int | None
    """None: unknown, as the model has no name table and its weights are not here."""
    vocab_size: int
    """Rows of the embedding."""
    tokenizer_ids: int | None
    """One more than the tokenizer's largest id; None: it did not load."""
    max_position_embeddings: int
    stops: tuple[tuple[int, str], ...] = ()
    """(id, text) of each token that ends a response."""


@dataclass(frozen=True, kw_only=True)
class FirstPrompt:
    """The first prompt of the run, as the servers get it."""

    prompt_id: str
    text: str
    """With special tokens."""
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """Texts of prompts and traces that the policy's tokenizer encoded and decoded again."""

    num_texts: int
    num_changed: int
    example: str | None
    """One changed text: its row, and the place and kind of the difference."""


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """The prompts of the training files or of one evaluation set."""

    name: str
    files: tuple[str, ...]
    prompts: PromptStatistics


@dataclass(frozen=True, kw_only=True)
class VerifierFacts:
    """One verifier on sampled rows of one source."""

    rows: str
    """``data.prompts`` or ``eval.sets.<set>``: whose rows they are."""
    verifier: str
    source: str
    num_rows: int
    """Rows of those that it judges."""
    num_tried: int
    """Rows of these that were tried, with their own answer and with other responses."""
    num_gold: int
    """Tried rows whose own answer it accepts, in one of the usual forms."""
    num_empty: int
    """Tried rows on which it accepts an empty response."""
    num_constant: int
    """Tried rows on which it accepts "I do not know."."""
    num_other: int
    """Tried rows on which it accepts the different answer of another row."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Prompts of an evaluation set that are also in the training files."""

    name: str
    num_rows: int
    num_shared: int
    examples: tuple[str, ...]


@dataclass(kw_only=True)
class Report:
    """All findings. A part that could not be checked is None or empty, and a problem says why."""

    model: ModelFacts | None = None
    first_prompt: FirstPrompt | None = None
    round_trip: RoundTrip | None = None
    sets: list[SetFacts] = field(default_factory=list)
    teachers: list[TeacherStatistics] = field(default_factory=list)
    verifiers: list[VerifierFacts] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Findings for which a run would refuse to start, or would learn nothing."""
    warnings: list[str] = field(default_factory=list)


def to_data(report: Report) -> dict[str, Any]:
    """Return the report for JSON."""
    data = asdict(report)
    for teacher, found in zip(data["teachers"], report.teachers, strict=True):
        teacher["accuracy"] = found.accuracy
    return data


def to_text(report: Report) -> str:
    """Return the report for people; its last line counts problems and warnings."""
    sections = [
        ("Model", _model(report)),
        ("First prompt", _first_prompt(report.first_prompt)),
        ("Prompts", _sets(report.sets)),
        ("Teachers", render_teachers(report.teachers)),
        ("Verifiers", _verifiers(report.verifiers)),
        ("Evaluation prompts that are training prompts too", _overlaps(report.overlaps)),
        ("Problems", _listed(report.problems)),
        ("Warnings", _listed(report.warnings)),
    ]
    texts = ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections if lines]
    last = f"{counted(len(report.problems), 'problem')}, {counted(len(report.warnings), 'warning')}"
    return "\n\n".join([*texts, last])


def _model(report: Report) -> list[str]:
    model, trip = report.model, report.round_trip
    if model is None:
        return []
    size = "an unknown number of" if model.num_parameters is None else f"{model.num_parameters:,}"
    lines = [
        f"{model.family}, {size} parameters, {model.max_position_embeddings} positions, vocab_size {model.vocab_size}"
    ]
    if model.tokenizer_ids is not None:
        lines.append(f"the tokenizer has ids up to {model.tokenizer_ids - 1}")
        lines.append("a response ends with " + ", ".join(f"{token_id} {text!r}" for token_id, text in model.stops))
    if trip is not None:
        lines.append(f"{trip.num_changed} of {trip.num_texts} texts change when they are encoded and decoded")
    return lines


def _first_prompt(first: FirstPrompt | None) -> list[str]:
    if first is None:
        return []
    text, ids = first.text, " ".join(map(str, first.ids[:_SHOWN_IDS]))
    more = len(text) - _SHOWN_CHARACTERS
    lines = [f"| {printable(line)}" for line in text[:_SHOWN_CHARACTERS].split("\n")]
    return [
        f"{printable(first.prompt_id)}, {len(first.ids)} tokens, special tokens shown as text:",
        *lines,
        *([f"and {more} more characters (--json)"] if more > 0 else []),
        f"ids {ids}" + (f" and {len(first.ids) - _SHOWN_IDS} more" if len(first.ids) > _SHOWN_IDS else ""),
    ]


def _sets(sets: Sequence[SetFacts]) -> list[str]:
    lines = []
    for facts in sets:
        found, lengths = facts.prompts, facts.prompts.lengths
        lines.append(f"{facts.name}: {counted(found.num_rows, 'row')} of {counted(len(facts.files), 'file')}")
        lines.append(f"  {counted(found.num_skipped, 'bad row')} left out, {found.num_too_long} too long")
        if facts.name == "data.prompts":
            lines.append(
                f"  {found.num_without_trace} without a trace that may be used, "
                f"{counted(found.num_failed_checks, 'trace')} failed their checks"
            )
        lines.append(
            f"  tokens: shortest {lengths.shortest}, median {lengths.median}, p90 {lengths.p90}, p99 {lengths.p99}, "
            f"longest {lengths.longest}"
        )
    return lines


def _verifiers(verifiers: Sequence[VerifierFacts]) -> list[str]:
    lines = []
    for found in verifiers:
        what = f"{found.rows}: {found.verifier} for source {printable(found.source)!r}"
        lines.append(f"{what}: {counted(found.num_rows, 'row')}")
        if found.num_tried:
            lines.append(
                f"  of {found.num_tried} tried it accepts the row's own answer on {found.num_gold}, an empty "
                f"response on {found.num_empty}, 'I do not know.' on {found.num_constant}, "
                f"another row's answer on {found.num_other}"
            )
    return lines


def _overlaps(overlaps: Sequence[Overlap]) -> list[str]:
    lines = []
    for found in overlaps:
        names = f": {', '.join(map(printable, found.examples))}" if found.examples else ""
        more = ", ..." if found.num_shared > len(found.examples) else ""
        lines.append(f"{found.name}: {found.num_shared} of {found.num_rows}{names}{more}")
    return lines


def _listed(entries: Sequence[str]) -> list[str]:
    return [("- " if index == 0 else "  ") + line for text in entries for index, line in enumerate(text.split("\n"))]
