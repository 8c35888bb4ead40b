"""``megatron-dypo grade``: a verifier over a file of responses and answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.words import counted
from megatron_dypo.grading.pair_file import Fields, Line, PairFile
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.grading.workers.results import shown
from megatron_dypo.metrics.progress import progress
from megatron_dypo.types import Verdict

_CHUNK = 4096
_SHOWN_CHARACTERS = 120


@dataclass(kw_only=True)
class Reason:
    """One error and its count."""

    error: str
    count: int
    first_line: int


@dataclass(kw_only=True)
class Summary:
    """The results of a file."""

    file: str
    verifier: str
    rows: int = 0
    correct: int = 0
    wrong: int = 0
    no_verdict: int = 0
    mean_reward: float | None = None
    """Mean reward over the rows with a verdict; None without a verdict."""
    num_reasons: int = 0
    """Number of different errors of rows without a verdict."""
    reasons: list[Reason] = field(default_factory=list)
    """The most frequent errors."""
    expected_field: str
    compared: int = 0
    """Rows with a verdict and an expected verdict."""
    accepted_wrong: int = 0
    """Rows found correct that are marked wrong."""
    refused_correct: int = 0
    """Rows found wrong that are marked correct."""
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    """The first ones: line, is_correct (the verifier's), answer, response (its end)."""


def grade_file(cfg: GradingConfig, path: Path, fields: Fields, *, show: int) -> Summary:
    """Judge every row of ``path`` with ``cfg.verifier``, in verifier processes as in a run.

    At most ``show`` reasons and disagreements are kept. Raises ValueError for a bad file, a bad row or a verifier that
    cannot be imported.
    """
    with closing(PairFile(path, fields)) as file, Verifier(cfg) as verifier:
        return _grade(
            file, verifier, Summary(file=str(path), verifier=cfg.verifier, expected_field=fields.expected), show
        )


def _grade(file: PairFile, verifier: Verifier, summary: Summary, show: int) -> Summary:
    errors: Counter[str] = Counter()
    first_lines: dict[str, int] = {}
    total_reward = 0.0
    with progress(len(file), "grading", "responses") as bar:
        for lines in _chunks(file.lines()):
            verdicts = verifier.verify([line.pair for line in lines], bar)
            for line, verdict in zip(lines, verdicts, strict=True):
                summary.rows += 1
                if verdict.error is not None:
                    errors[verdict.error] += 1
                    first_lines.setdefault(verdict.error, line.number)
                    continue
                total_reward += verdict.reward
                _count(summary, line, verdict, show)
    summary.no_verdict = errors.total()
    judged = summary.correct + summary.wrong
    summary.mean_reward = total_reward / judged if judged else None
    summary.reasons = [Reason(error=e, count=n, first_line=first_lines[e]) for e, n in errors.most_common(show)]
    summary.num_reasons = len(errors)
    return summary


def _count(summary: Summary, line: Line, verdict: Verdict, show: int) -> None:
    summary.correct += verdict.is_correct
    summary.wrong += not verdict.is_correct
    if line.expected is None:
        return
    summary.compared += 1
    if line.expected == verdict.is_correct:
        return
    summary.accepted_wrong += verdict.is_correct
    summary.refused_correct += not verdict.is_correct
    if len(summary.disagreements) < show:
        response = line.pair.response[-_SHOWN_CHARACTERS:].encode("utf-8", "backslashreplace").decode("utf-8")
        found = {"line": line.number, "is_correct": verdict.is_correct}
        summary.disagreements.append({**found, "answer": shown(line.pair.answer), "response": response})


def to_data(summary: Summary) -> dict[str, Any]:
    """Return the summary for JSON."""
    return asdict(summary)


def to_text(summary: Summary) -> str:
    """Return the summary for people."""
    lines = [
        f"{summary.file}, verifier {summary.verifier}: {counted(summary.rows, 'response')}",
        f"  correct     {summary.correct:>8}{_share(summary.correct, summary.rows)}",
        f"  wrong       {summary.wrong:>8}{_share(summary.wrong, summary.rows)}",
        f"  no verdict  {summary.no_verdict:>8}{_share(summary.no_verdict, summary.rows)}",
    ]
    if summary.mean_reward is not None:
        lines.append(
            f"  mean reward {summary.mean_reward:>8.3f}, over {counted(summary.correct + summary.wrong, 'verdict')}"
        )
    if summary.num_reasons:
        lines.append("why there is no verdict:")
        lines += [f"  {r.count:>6} × {r.error} (first in line {r.first_line})" for r in summary.reasons]
        lines += _rest(summary.num_reasons, len(summary.reasons), "reason")
    if summary.compared:
        count = summary.accepted_wrong + summary.refused_correct
        lines.append(
            f"differs from {summary.expected_field!r} in {count} of {counted(summary.compared, 'verdict')}: "
            f"{summary.accepted_wrong} accepted that are marked wrong, "
            f"{summary.refused_correct} refused that are marked correct"
        )
        for found in summary.disagreements:
            said = "accepts" if found["is_correct"] else "refuses"
            lines.append(
                f"  line {found['line']}: {said}; answer {found['answer']}; response ends {found['response']!r}"
            )
        lines += _rest(count, len(summary.disagreements), "row")
    return "\n".join(lines)


def _share(count: int, total: int) -> str:
    return f"  {100 * count / total:5.1f}%"


def _rest(count: int, shown_count: int, noun: str) -> list[str]:
    return [f"  and {counted(count - shown_count, f'more {noun}')} (--show)"] if count > shown_count else []


def _chunks(lines: Iterator[Line]) -> Iterator[list[Line]]:
    while chunk := list(itertools.islice(lines, _CHUNK)):
        yield chunk
