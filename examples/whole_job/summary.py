"""Summarize the metrics of a run in a few numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_dypo.metrics.intervals import wilson_interval
from megatron_dypo.metrics.records import read_metrics

TIERS = ("easy", "mid", "hard")
NUM_EDGE_STEPS = 5
"""Steps at the start, and at the end, over which the tiers are averaged."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of ``summary.json``."""

    accuracy_before: float
    accuracy_before_interval: tuple[float, float]
    """95% interval (Wilson)."""
    accuracy_after: float
    accuracy_after_interval: tuple[float, float]
    tiers_first: dict[str, float]
    """Tier → share of the graded prompts, over the first steps."""
    tiers_last: dict[str, float]
    num_heldout: int
    steps: int
    step_seconds: float
    """Mean time of a step."""
    overhead: float
    """Share of the steps' time outside rollouts, grading, training and refits."""
    refit: float
    """Share of the steps' time that refits take: new weights to the servers."""
    seconds: float
    """Wall time of the whole job."""

    def as_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def summarize(metrics: Path, *, eval_set: str, seconds: float) -> Summary:
    """Return the summary of a run's ``metrics.jsonl``.

    Raises:
        ValueError: the file has fewer than two evaluations or no graded step.
    """
    rows = read_metrics(metrics)
    evaluations = [row for row in rows if f"eval/{eval_set}/accuracy" in row]
    steps = [row for row in rows if "gate/easy" in row]
    if len(evaluations) < 2 or not steps:
        raise ValueError(
            f"{metrics}: {len(evaluations)} evaluations of {eval_set!r} and {len(steps)} graded steps: "
            "needs an evaluation before and one after, and a step"
        )
    before, after = (_accuracy(row, eval_set) for row in (evaluations[0], evaluations[-1]))
    step_seconds = fmean(row["timing_s/step"] for row in steps)
    return Summary(
        accuracy_before=before[0],
        accuracy_before_interval=wilson_interval(*before),
        accuracy_after=after[0],
        accuracy_after_interval=wilson_interval(*after),
        tiers_first=_mean_tiers(steps[:NUM_EDGE_STEPS]),
        tiers_last=_mean_tiers(steps[-NUM_EDGE_STEPS:]),
        num_heldout=after[1],
        steps=len(steps),
        step_seconds=step_seconds,
        overhead=fmean(row["timing_s/other"] for row in steps) / step_seconds,
        refit=fmean(row["timing_s/refit"] for row in steps) / step_seconds,
        seconds=seconds,
    )


def _accuracy(row: Mapping[str, float], eval_set: str) -> tuple[float, int]:
    return row[f"eval/{eval_set}/accuracy"], int(row[f"eval/{eval_set}/num_samples"])


def _mean_tiers(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {tier: fmean(row[f"gate/{tier}"] for row in steps) for tier in TIERS}


def closing_words(summary: Summary, out: Path, job: str) -> str:
    """Return the text to print at the end of a job whose DYPO run is in ``out / "dypo"``."""

    def accuracy(value: float, interval: tuple[float, float]) -> str:
        return f"{value:6.1%}   (95% interval {interval[0]:.1%} to {interval[1]:.1%})"

    def tiers(shares: dict[str, float]) -> str:
        return "   ".join(f"{tier} {share:4.0%}" for tier, share in shares.items())

    step = f"{summary.step_seconds:.1f} s, of which {summary.overhead:.1%}"
    return f"""
held-out accuracy   before {accuracy(summary.accuracy_before, summary.accuracy_before_interval)}
                    after  {accuracy(summary.accuracy_after, summary.accuracy_after_interval)}
prompts drawn       at the start   {tiers(summary.tiers_first)}
                    at the end     {tiers(summary.tiers_last)}
a step              {step} outside rollouts, grading, training and refits
{f"whole {job}":<20}{summary.seconds:.0f} s
report              {out / "dypo" / "report.html"}
HF model            {out / "dypo" / "hf"}
summary             {out / "summary.json"}"""
