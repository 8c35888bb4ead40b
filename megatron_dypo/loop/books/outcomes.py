"""The outcomes of one collection over all replicas, and the conditions under which they end the run. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.books.ledger import dropped_words
from megatron_dypo.types import DropReason, GradedGroup

_LOST = (DropReason.INCOMPLETE, DropReason.REFUSED)
_UNGRADED = (*_LOST, DropReason.NO_VERDICT, DropReason.TOO_LONG)


@dataclass(kw_only=True)
class Outcomes:
    """Counts since a collection began. Counts of several replicas can be added."""

    graded: int = 0
    """Groups with a tier, and prompts that need no rollouts."""
    dropped: Counter[DropReason] = field(default_factory=Counter)
    verdicts: int = 0
    """Rollouts that the verifier judged."""
    teacher_answers: int = 0
    """Rollouts for which the teacher gave log-probs."""
    last_reason: str = ""
    """Why the last group was lost or had no verdict."""

    def drop(self, reason: DropReason, count: int = 1, message: str = "") -> None:
        self.dropped[reason] += count
        self.last_reason = message or self.last_reason

    @property
    def seen(self) -> int:
        """Prompts that are graded, or dropped for any reason."""
        return self.graded + sum(self.dropped[reason] for reason in _UNGRADED)

    @property
    def lost(self) -> int:
        """Prompts without a whole group."""
        return sum(self.dropped[reason] for reason in _LOST)

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(
            graded=self.graded + other.graded,
            dropped=self.dropped + other.dropped,
            verdicts=self.verdicts + other.verdicts,
            teacher_answers=self.teacher_answers + other.teacher_answers,
            last_reason=self.last_reason or other.last_reason,
        )


def end_on_request() -> RunEnded:
    """Return the end of a run that was asked to stop while it collected."""
    return RunEnded(
        Cause.STOPPED, "stopped on request while rollouts were collected; what was in flight is sampled again"
    )


def count_verdicts(groups: Iterable[GradedGroup], fail_truncated: bool) -> int:
    """Count the rollouts that the verifier judged, without those that it failed on or never got."""
    return sum(
        verdict.error is None and not (fail_truncated and rollout.finish == "length")
        for group in groups
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
    )


def end_without_verdicts(now: Outcomes, before: Outcomes, at_least: int) -> RunEnded | None:
    """Return the end of the run if its verifier, since ``before``, judged nothing and failed on ``at_least`` groups."""
    failed = now.dropped[DropReason.NO_VERDICT] - before.dropped[DropReason.NO_VERDICT]
    if failed < at_least or now.verdicts > before.verdicts:
        return None
    return RunEnded(
        Cause.NO_VERDICTS,
        f"the verifier gave no verdict on any rollout of {failed} groups in a row; the last reason: {now.last_reason}",
    )


def end_without_teacher(now: Outcomes, before: Outcomes, at_least: int) -> RunEnded | None:
    """Return the end of the run if its teacher, since ``before``, gave no log-probs and failed on ``at_least``
    groups."""
    failed = now.dropped[DropReason.NO_TEACHER_LOGP] - before.dropped[DropReason.NO_TEACHER_LOGP]
    if failed < at_least or now.teacher_answers > before.teacher_answers:
        return None
    return RunEnded(
        Cause.SERVERS_GONE,
        f"the teacher gave log-probs of no rollout of {failed} groups in a row; the last reason: {now.last_reason}",
    )


def end_without_samples(outcomes: Outcomes, *, num_prompts: int, step: int, max_prompt_tokens: int) -> RunEnded | None:
    """Return the end of the run if its collection reached its limit and found nothing to learn from; None: go on.

    Args:
        num_prompts: rows of the data. NOTHING_LEFT is possible only after that many draws were graded.
    """
    dropped = outcomes.dropped
    if outcomes.graded == 0:
        return RunEnded(_cause_without_grades(outcomes), _ungraded(outcomes, step, max_prompt_tokens))
    if outcomes.seen < num_prompts:
        return None
    usable = Counter({reason: dropped[reason] for reason in (DropReason.EASY, DropReason.NO_TEACHER)})
    failed = outcomes.lost + dropped[DropReason.NO_VERDICT] + dropped[DropReason.NO_TEACHER_LOGP]
    words = ", ".join(dropped_words(dropped))
    if failed > usable.total():
        cause = Cause.NO_VERDICTS if dropped[DropReason.NO_VERDICT] > outcomes.lost else Cause.GROUPS_LOST
        reason = f"; the last reason: {outcomes.last_reason}"
        return RunEnded(cause, f"step {step}: no trainable prompt among {outcomes.seen} draws: {words}{reason}")
    return RunEnded(Cause.NOTHING_LEFT, f"step {step}: no trainable prompt left among {outcomes.seen} draws: {words}")


def _cause_without_grades(outcomes: Outcomes) -> Cause:
    dropped = outcomes.dropped
    if outcomes.lost == 0 and dropped[DropReason.NO_VERDICT] == 0:
        return Cause.BAD_INPUT
    return Cause.GROUPS_LOST if outcomes.lost >= dropped[DropReason.NO_VERDICT] else Cause.NO_VERDICTS


def _ungraded(outcomes: Outcomes, step: int, max_prompt_tokens: int) -> str:
    dropped = outcomes.dropped
    if dropped[DropReason.TOO_LONG] == outcomes.seen:
        long = f"{outcomes.seen} of {outcomes.seen} prompts are longer than data.max_prompt_tokens={max_prompt_tokens}"
        return f"step {step}: {long}"
    words = ", ".join(dropped_words(dropped))
    reason = f"the last reason: {outcomes.last_reason}"
    return f"step {step}: none of {outcomes.seen} prompts could be graded: {words}; {reason}"
