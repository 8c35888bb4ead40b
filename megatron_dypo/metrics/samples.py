"""The samples of a run, for people: ``samples/step_000012.jsonl``, one row for each prompt of a step.

With several data-parallel replicas, each writes its own file, ``step_000012.00003.jsonl``; readers merge them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from megatron_dypo.fs import replace_file
from megatron_dypo.json_text import parse_json
from megatron_dypo.metrics.names import name_part
from megatron_dypo.types import DropReason, GradedGroup, Prompt, Rollout, Treatment, Verdict

SAMPLES_DIR = "samples"
_FILE_NAME = re.compile(r"step_(\d+)(?:\.(\d+))?\.jsonl")


class VerdictRow(TypedDict):
    """The verifier's verdict on a rollout or a trace."""

    is_correct: bool
    reward: float
    error: str | None
    """Why there is no verdict; None if there is one."""


class RolloutRow(VerdictRow):
    """One rollout, with its verdict."""

    text: str
    finish: str
    num_tokens: int
    policy_version: int


class SampleRow(TypedDict):
    """One prompt of a step."""

    step: int
    prompt_id: str
    source: str
    prompt: str
    answer: Any
    """The answer: text, or another value for a user's own verifier."""
    tier: str | None
    treatment: str
    teacher: str | None
    """The teacher whose trace was drawn; None if the prompt is not distilled."""
    policy_version: int | None
    """Version of the oldest rollout; None without rollouts."""
    rollouts: list[RolloutRow]
    trace: str | None
    """The text of the trace."""
    trace_verdict: VerdictRow | None
    """The verdict on the trace; None if the objective does not ask for one."""
    dropped: str | None
    """Why nothing is learned from the prompt; None if something is."""


def sample_row(
    step: int,
    graded: GradedGroup,
    treatment: Treatment,
    *,
    teacher: str | None = None,
    trace: str | None = None,
    dropped: DropReason | None = None,
) -> SampleRow:
    """Return the row of a graded group, with ``teacher`` and ``trace`` (text) if it is distilled."""
    prompt = graded.prompt
    pairs = zip(graded.rollouts, graded.verdicts, strict=True)
    return SampleRow(
        step=step,
        prompt_id=prompt.prompt_id,
        source=prompt.source,
        prompt=prompt.text,
        answer=prompt.answer,
        tier=graded.tier.value if graded.tier else None,
        treatment=treatment.value,
        teacher=teacher,
        policy_version=min((rollout.policy_version for rollout in graded.rollouts), default=None),
        rollouts=[_rollout_row(rollout, verdict) for rollout, verdict in pairs],
        trace=trace,
        trace_verdict=_verdict_row(graded.trace_verdict) if graded.trace_verdict else None,
        dropped=dropped.value if dropped else None,
    )


def dropped_row(step: int, prompt: Prompt, reason: DropReason) -> SampleRow:
    """Return the row of a prompt whose group never came back."""
    group = GradedGroup(prompt=prompt, rollouts=(), verdicts=(), tier=None)
    return sample_row(step, group, Treatment.DROP, dropped=reason)


def _rollout_row(rollout: Rollout, verdict: Verdict) -> RolloutRow:
    return RolloutRow(
        **_verdict_row(verdict),
        text=rollout.text,
        finish=rollout.finish,
        num_tokens=len(rollout.tokens),
        policy_version=rollout.policy_version,
    )


def _verdict_row(verdict: Verdict) -> VerdictRow:
    return VerdictRow(is_correct=verdict.is_correct, reward=verdict.reward, error=verdict.error)


class SampleLog:
    """Writes the samples of one replica. ``shard`` is its data-parallel rank, or None for the only replica."""

    def __init__(
        self, run_dir: Path, *, shard: int | None = None, max_rows: int = 0, folder: str = SAMPLES_DIR
    ) -> None:
        """``max_rows``: number of first rows to keep of each step; 0: all. ``folder``: subfolder of the run."""
        self.shard = shard
        self._dir = run_dir / folder
        self._suffix = "" if shard is None else f".{shard:05d}"
        self._max_rows = max_rows

    def write(self, step: int, rows: Sequence[SampleRow]) -> Path:
        """Write the file of ``step``, whole or not at all. An existing file is replaced."""
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / f"step_{step:06d}{self._suffix}.jsonl"
        kept = rows[: self._max_rows] if self._max_rows else rows
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept)
        # A lone surrogate becomes a JSON escape. The write need not be durable, since a resumed run writes the files
        # after its checkpoint again.
        replace_file(path, text.encode("utf-8", "backslashreplace"), durable=False)
        return path


def eval_folder(name: str) -> str:
    """Return the subfolder of a run for the responses to one evaluation set."""
    return f"{SAMPLES_DIR}/eval/{name_part(name)}"


def discard_samples(run_dir: Path, from_step: int) -> None:
    """Remove the samples of ``from_step`` and later of all replicas, since a resumed run writes them again."""
    for folder in (run_dir / SAMPLES_DIR, *(run_dir / SAMPLES_DIR / "eval").glob("*")):
        for step, paths in _files(folder).items():
            if step >= from_step:
                for path in paths:
                    path.unlink()


def sample_steps(run_dir: Path) -> list[int]:
    """Return the steps that have samples, in order."""
    return sorted(_files(run_dir / SAMPLES_DIR))


def read_samples(run_dir: Path, steps: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``steps`` (None: all) by step, then replica. ValueError (file, line) for a bad line."""
    files = _files(run_dir / SAMPLES_DIR)
    for step in sorted(files) if steps is None else steps:
        for path in files.get(step, ()):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    yield _parse(path, number, line)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not a JSON object: {error}") from error
    return row


def _files(folder: Path) -> dict[int, list[Path]]:
    """Return step → files of its replicas, in the order of replicas."""
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in folder.glob("step_*.jsonl"):
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), []).append((int(match[2] or -1), path))
    return {step: [path for _, path in sorted(paths)] for step, paths in found.items()}
