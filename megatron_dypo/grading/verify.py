"""Verification in worker processes with hard deadlines, and the grading of groups."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from types import TracebackType

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.processes import WorkerDied, WorkerProcess
from megatron_dypo.grading.tiers import grade_tier
from megatron_dypo.progress import Progress, progress
from megatron_dypo.types import GradedGroup, RolloutGroup, Verdict

logger = logging.getLogger(__name__)

_KINDS = {
    "math": "megatron_dypo.grading.math:verify_math",
    "exact": "megatron_dypo.grading.exact:verify_exact",
    "choice": "megatron_dypo.grading.choice:verify_choice",
}
_MAX_BATCH = 32
_SHOWN_ERRORS = 10
_SHOWN_CHARACTERS = 300


class Verifier:
    """Judges (response, answer) pairs in ``cfg.workers`` processes; a context manager.

    A verification that raises, outlives ``cfg.deadline_s`` or ends its process costs that one pair: its Verdict is
    incorrect and carries ``error``, a warning shows its input, and the process is replaced where need be. Entering
    starts the processes and imports the verifier; it raises ValueError naming ``grading.verifier`` if that fails.
    Threads that verify at the same time take turns.
    """

    def __init__(self, cfg: GradingConfig) -> None:
        self._cfg = cfg
        self._import_path = _KINDS.get(cfg.verifier, cfg.verifier)
        module, _, function = self._import_path.partition(":")
        if not module or not function.isidentifier():
            raise ValueError(f"grading.verifier={cfg.verifier!r}: an import path must look like pkg.module:function")
        self._workers: list[WorkerProcess] = []
        self._turn = threading.Lock()
        self.num_errors = 0
        """Verifications since the start that ended in an error."""

    def __enter__(self) -> Verifier:
        self._workers = [self._new_worker() for _ in range(self._cfg.workers)]
        try:
            for worker in self._workers:
                self._await_start(worker)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def verify(self, pairs: Sequence[tuple[str, str]], bar: Progress | None = None) -> list[Verdict]:
        """Verdicts of (response, answer) ``pairs``, in their order; ``bar`` is updated by one for each."""
        if not self._workers:
            raise RuntimeError("the verifier is not running: use it in a `with` block")
        with self._turn:
            return self._verify(pairs, bar)

    def _verify(self, pairs: Sequence[tuple[str, str]], bar: Progress | None) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(pairs)
        todo = deque(range(len(pairs)))
        batch = max(1, min(_MAX_BATCH, len(pairs) // (4 * len(self._workers))))
        num_done = 0
        while num_done < len(pairs):
            self._hand_out(todo, pairs, batch)
            for index, verdict in self._collect(todo):
                verdicts[index] = verdict
                num_done += 1
                if bar is not None:
                    bar.update(1)
        judged = [verdict for verdict in verdicts if verdict is not None]
        self._report(pairs, judged)
        return judged

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(self._import_path, self._cfg.deadline_s)

    def _await_start(self, worker: WorkerProcess) -> None:
        assert worker.deadline is not None
        try:
            if not worker.connection.poll(max(0.0, worker.deadline - time.monotonic())):
                raise ValueError("its import takes too long")
            worker.receive_start()
        except ValueError as error:
            raise ValueError(f"grading.verifier={self._cfg.verifier!r}: {error}") from error

    def _hand_out(self, todo: deque[int], pairs: Sequence[tuple[str, str]], batch: int) -> None:
        for worker in list(self._workers):
            if todo and worker.is_ready and not worker.pending:
                indices = [todo.popleft() for _ in range(min(batch, len(todo)))]
                try:
                    worker.send(indices, [pairs[index] for index in indices])
                except WorkerDied as death:
                    logger.warning("%s while idle; starting another", death)
                    todo.extendleft(reversed(indices))
                    self._replace(worker)

    def _collect(self, todo: deque[int]) -> list[tuple[int, Verdict]]:
        """Wait until some worker has something to say, or is overdue."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        wait([worker.connection for worker in self._workers], max(0.0, min(deadlines) - time.monotonic()) + 0.001)
        done = []
        for worker in list(self._workers):
            if worker.is_overdue():
                error = f"no verdict within deadline_s={self._cfg.deadline_s:g}"
                done += self._bury(worker, todo, error)
            elif not worker.connection.poll():
                continue
            elif not worker.is_ready:
                self._await_start(worker)
            else:
                try:
                    index, (is_correct, reward, problem) = worker.receive()
                    done.append((index, Verdict(is_correct=is_correct, reward=reward, error=problem)))
                except WorkerDied as death:
                    done += self._bury(worker, todo, str(death))
        return done

    def _bury(self, worker: WorkerProcess, todo: deque[int], error: str) -> list[tuple[int, Verdict]]:
        """Replace a worker that is overdue or dead: the pair it worked on is lost, the rest of its batch goes back."""
        if not worker.is_ready:
            raise ValueError(f"grading.verifier={self._cfg.verifier!r}: its import takes too long")
        lost = [worker.pending.popleft()] if worker.pending else []
        todo.extendleft(reversed(worker.pending))
        self._replace(worker)
        return [(index, Verdict(is_correct=False, reward=0.0, error=error)) for index in lost]

    def _replace(self, worker: WorkerProcess) -> None:
        worker.stop()
        self._workers[self._workers.index(worker)] = self._new_worker()

    def _report(self, pairs: Sequence[tuple[str, str]], verdicts: Sequence[Verdict]) -> None:
        failed = [index for index, verdict in enumerate(verdicts) if verdict.error is not None]
        self.num_errors += len(failed)
        for index in failed[:_SHOWN_ERRORS]:
            response, answer = pairs[index]
            tail = response[-_SHOWN_CHARACTERS:]
            logger.warning("verifier failed: %s; answer %r; response ends %r", verdicts[index].error, answer, tail)
        if len(failed) > _SHOWN_ERRORS:
            logger.warning("verifier failed on %d more of %d", len(failed) - _SHOWN_ERRORS, len(pairs))


def grade(
    groups: Sequence[RolloutGroup], verifier: Verifier, truncated_is_wrong: bool, *, show_progress: bool = True
) -> list[GradedGroup]:
    """Verdicts and tiers of ``groups``, in their order; a group without rollouts has tier None.

    With ``truncated_is_wrong`` a rollout that hit the length limit is incorrect without being verified.
    """
    wanted = [
        [not (truncated_is_wrong and rollout.finish == "length") for rollout in group.rollouts] for group in groups
    ]
    pairs = [
        (rollout.text, group.prompt.answer)
        for group, flags in zip(groups, wanted, strict=True)
        for rollout, is_wanted in zip(group.rollouts, flags, strict=True)
        if is_wanted
    ]
    with progress(len(pairs), "grading", "responses", enabled=show_progress) as bar:
        judged = iter(verifier.verify(pairs, bar))
    truncated = Verdict(is_correct=False, reward=0.0)
    graded = []
    for group, flags in zip(groups, wanted, strict=True):
        verdicts = tuple(next(judged) if is_wanted else truncated for is_wanted in flags)
        tier = grade_tier([verdict.is_correct for verdict in verdicts]) if verdicts else None
        graded.append(GradedGroup(prompt=group.prompt, rollouts=group.rollouts, verdicts=verdicts, tier=tier))
    return graded
