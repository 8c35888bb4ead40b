"""Verification in worker processes with hard deadlines, and the grading of groups."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

from megatron_dypo.config.grading import BUILT_IN_VERIFIERS, GradingConfig
from megatron_dypo.grading.naming import import_path, keys_that_name, options_of, verifier_of
from megatron_dypo.grading.pairs import Pair, pair_of
from megatron_dypo.grading.tiers import grade_tier
from megatron_dypo.grading.workers.error_log import ErrorLog
from megatron_dypo.grading.workers.judging import Outcome
from megatron_dypo.grading.workers.pool import Job, Pool
from megatron_dypo.grading.workers.process import ImportFailed
from megatron_dypo.grading.workers.worker import Setup
from megatron_dypo.metrics.progress import Progress, progress
from megatron_dypo.types import GradedGroup, Prompt, Rollout, RolloutGroup, Verdict

_START_DEADLINE_S = 300.0
"""Seconds for the start. Importing sympy takes a second, but much longer on a machine that is starting a job."""


class Verifier:
    """Judges responses in ``cfg.workers`` processes; a context manager.

    Each row's verifier is its own, else that of its source, else ``grading.verifier``. If a verification raises,
    exceeds ``cfg.deadline_s`` or ends its process, only that pair is affected: its Verdict has ``error``, which means
    that there is no verdict, and the process is replaced if needed. Entering the context starts the processes and
    imports all verifiers that the config and ``row_verifiers`` (those that rows name) name; it raises ValueError naming
    the key if that fails. Threads that verify at the same time take turns.
    """

    def __init__(
        self,
        cfg: GradingConfig,
        row_verifiers: Collection[str] = (),
        *,
        start_deadline_s: float = _START_DEADLINE_S,
        named_by: Mapping[str, str] | None = None,
    ) -> None:
        """``named_by``: verifier → key for verifiers that another section than ``cfg`` names. Errors show that key."""
        self._cfg, self._start_deadline_s, self._named_by = cfg, start_deadline_s, dict(named_by or {})
        own = {verifier_of(cfg, own=name, source="") for name in row_verifiers}
        self._names = own | {name for _, name in cfg.named_verifiers()}
        self._pool: Pool | None = None
        self._turn = threading.Lock()
        self._errors = ErrorLog()
        self.num_verified = 0
        """Number of verifications since the start with a verdict."""
        self.num_errors = 0
        """Number of verifications since the start without a verdict."""
        self.last_error: str | None = None
        """The error of the last verification without a verdict."""
        self.num_replaced = 0
        """Number of processes since the start that died or were ended at their deadline, and were replaced."""

    def __enter__(self) -> Verifier:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def takers_of(self, fields: Collection[str]) -> list[str]:
        """Return the verifiers in use whose functions ask for one of ``fields`` (``row``, ``extra_info``, …)."""
        asked = self._pool.fields() if self._pool is not None else {}
        return [name for name, own in asked.items() if set(own) & set(fields)]

    def verify(self, pairs: Sequence[Pair | tuple[str, Any]], bar: Progress | None = None) -> list[Verdict]:
        """Return the verdicts of ``pairs``, in their order; ``bar`` is updated by one for each.

        A tuple (response, answer) is a pair without other fields.

        Raises ValueError naming the key if a replaced process can no longer import a verifier.
        """
        if self._pool is None or not self._pool.is_running:
            raise RuntimeError(
                "the verifier is not running: use it in a `with` block, and not after a call that broke off"
            )
        whole = [Pair(response=pair[0], answer=pair[1]) if isinstance(pair, tuple) else pair for pair in pairs]
        with self._turn:
            verdicts = self._verify(whole, bar)
            self._count(whole, verdicts)
        return verdicts

    def _verify(self, pairs: Sequence[Pair], bar: Progress | None) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(pairs)
        jobs: list[Job] = []
        places: list[int] = []

        def settle(place: int, outcome: Outcome) -> None:
            is_correct, reward, error = outcome
            verdicts[place] = Verdict(is_correct=is_correct, reward=reward, error=error)
            if bar is not None:
                bar.update(1)

        for place, pair in enumerate(pairs):
            try:
                name = verifier_of(self._cfg, own=pair.verifier, source=pair.source)
            except ValueError as error:
                settle(place, (False, 0.0, str(error)))
            else:
                jobs.append((name, pair))
                places.append(place)
        pool = self._pool_with({name for name, _ in jobs})
        try:
            pool.run(jobs, lambda number, outcome: settle(places[number], outcome))
        except ImportFailed as failed:
            raise self._named(failed) from failed
        assert all(verdict is not None for verdict in verdicts)
        return [verdict for verdict in verdicts if verdict is not None]

    def _pool_with(self, names: set[str]) -> Pool:
        """Return the processes; start others if these lack a built-in verifier that a row names."""
        if not names <= self._names:
            self.close()
            self._names |= names
            self._start()
        assert self._pool is not None
        return self._pool

    def _start(self) -> None:
        setup = Setup(
            paths={name: import_path(name) for name in sorted(self._names)},
            options={name: options_of(self._cfg, name) for name in BUILT_IN_VERIFIERS},
            built_in=frozenset(BUILT_IN_VERIFIERS),
            deadline_s=self._cfg.deadline_s,
            start_deadline_s=self._start_deadline_s,
        )
        self._pool = Pool(
            setup, workers=self._cfg.workers, batch_size=self._cfg.batch_size, on_replaced=self._count_replaced
        )
        try:
            self._pool.start()
        except ImportFailed as failed:
            raise self._named(failed) from failed

    def _named(self, failed: ImportFailed) -> ValueError:
        keys = {
            name: f"{self._named_by[name]}={name!r}" if name in self._named_by else keys_that_name(self._cfg, name)
            for name in failed.problems
        }
        return ValueError("\n".join(f"{keys[name]}: {problem}" for name, problem in failed.problems.items()))

    def _count_replaced(self) -> None:
        self.num_replaced += 1

    def _count(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> None:
        failed = [
            (pair, verdict.error) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.error is not None
        ]
        self.num_errors += len(failed)
        self.num_verified += len(pairs) - len(failed)
        if failed:
            self.last_error = failed[-1][1]
        self._errors.report(failed, len(pairs))


def grade(
    groups: Sequence[RolloutGroup],
    verifier: Verifier,
    fail_truncated: bool,
    *,
    trace_text: Callable[[Prompt], str | None] | None = None,
    show_progress: bool = True,
) -> list[GradedGroup]:
    """Return the verdicts and tiers of ``groups``, in their order.

    The tier is None for a group without rollouts, and for one in which a rollout, or the trace, has no verdict
    (:func:`verdict_problem`): its other verdicts alone would say something else of the prompt. With
    ``fail_truncated`` a rollout that hit the length limit is incorrect without being verified. Verdicts that a group
    has already stay.

    Args:
        trace_text: returns the teacher's trace that is judged beside a prompt's rollouts, or None. Without it no trace
            is judged.
    """
    truncated = Verdict(is_correct=False, reward=0.0)
    texts = [
        [None if fail_truncated and rollout.finish == "length" else rollout.text for rollout in _without_verdict(group)]
        for group in groups
    ]
    traces = [trace_text(group.prompt) if trace_text is not None else None for group in groups]
    pairs = [
        pair_of(group.prompt, text)
        for group, own, trace in zip(groups, texts, traces, strict=True)
        for text in (*own, trace)
        if text is not None
    ]
    with progress(len(pairs), "grading", "responses", enabled=show_progress) as bar:
        judged = iter(verifier.verify(pairs, bar))
    graded = []
    for group, own, trace in zip(groups, texts, traces, strict=True):
        verdicts = tuple(truncated if text is None else next(judged) for text in own)
        graded.append(_graded(group, group.verdicts + verdicts, None if trace is None else next(judged)))
    return graded


def _without_verdict(group: RolloutGroup) -> Sequence[Rollout]:
    return group.rollouts[len(group.verdicts) :]


def _graded(group: RolloutGroup, verdicts: tuple[Verdict, ...], of_trace: Verdict | None) -> GradedGroup:
    is_whole = bool(verdicts) and all(verdict.error is None for verdict in (*verdicts, of_trace) if verdict is not None)
    tier = grade_tier([verdict.is_correct for verdict in verdicts]) if is_whole else None
    return GradedGroup(
        prompt=group.prompt, rollouts=group.rollouts, verdicts=verdicts, tier=tier, trace_verdict=of_trace
    )


def verdict_problem(group: GradedGroup) -> str | None:
    """Return the error of the group's first rollout, or of its trace, without a verdict; None if each one has one."""
    verdicts = (*group.verdicts, group.trace_verdict)
    return next((v.error for v in verdicts if v is not None and v.error is not None), None)
