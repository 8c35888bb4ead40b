"""The samples in a report: some rows of some steps, spread evenly over the run, with long texts shortened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.metrics.report.plots import thin
from megatron_dypo.metrics.samples import read_samples, sample_steps

MAX_ROWS = 600
"""Most prompts on the page."""
MAX_STEPS = 60
"""Most steps from which these come."""
MAX_CHARS = 8_000_000
"""Most characters of all their texts together."""


@dataclass(frozen=True)
class SampleTable:
    """The rows of the page, and the numbers of steps and prompts from which they were chosen."""

    rows: list[dict[str, Any]]
    num_steps: int
    """Steps of the run that have samples."""
    num_steps_shown: int
    num_prompts_shown_steps: int
    """All prompts of the shown steps."""


def select_samples(run_dir: Path) -> SampleTable:
    """Choose rows evenly over the steps and within each step. The first and the last step are always among them."""
    steps = sample_steps(run_dir)
    shown = thin(steps, MAX_STEPS)
    rows: list[dict[str, Any]] = []
    num_prompts = 0
    for step in shown:
        of_step = list(read_samples(run_dir, [step]))
        num_prompts += len(of_step)
        rows += thin(of_step, max(MAX_ROWS // len(shown), 2))
    limit = MAX_CHARS // max(sum(2 + len(row["rollouts"]) for row in rows), 1)
    return SampleTable([_shortened(row, limit) for row in rows], len(steps), len(shown), num_prompts)


def shorten(text: str, limit: int) -> str:
    """Return ``text``, without its middle if it is longer than ``limit`` characters, since answers are at the end."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[len(text) - tail :]}"


def _shortened(row: dict[str, Any], limit: int) -> dict[str, Any]:
    texts = {
        name: shorten(_text(row[name]), limit) for name in ("prompt", "answer", "trace") if row.get(name) is not None
    }
    rollouts = [{**rollout, "text": shorten(rollout["text"], limit)} for rollout in row["rollouts"]]
    return {**row, **texts, "rollouts": rollouts}


def _text(value: Any) -> str:
    """Return a text unchanged, and an answer that is an object as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
