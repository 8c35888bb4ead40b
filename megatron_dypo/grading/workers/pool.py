"""A fixed number of verifier processes that share the pairs of one call."""

from __future__ import annotations

import logging
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

from megatron_dypo.grading.pairs import Pair, values_of
from megatron_dypo.grading.workers.judging import WHOLE_BATCH, Item, Outcome, late_error
from megatron_dypo.grading.workers.output import OutputTap
from megatron_dypo.grading.workers.process import CallerInfo, ImportFailed, WorkerDied, WorkerProcess
from megatron_dypo.grading.workers.worker import Setup
from megatron_dypo.processes.importing import describe
from megatron_dypo.processes.running_time import running_time

logger = logging.getLogger(__name__)

_MAX_BATCH = 32
_MAX_BATCH_BYTES = 2**20
_MAX_IDLE_DEATHS = 8
"""Number of processes in a row that may die without answering for a pair."""

_GIVE_UP_DEADLINES = 10
"""Number of deadlines that may pass in one call without a verdict. A service that a verifier asks can be down for
hours."""

Job = tuple[str, Pair]
"""A verifier's name and the pair to judge."""


class Pool:
    """``workers`` processes, each of which has imported all verifiers of ``setup``.

    If a pair raises, is late or ends its process, no other pair is affected: the process is replaced, and its other
    pairs go to another process. Pairs that were judged together with it are tried again one at a time.
    """

    def __init__(self, setup: Setup, *, workers: int, batch_size: int, on_replaced: Callable[[], None]) -> None:
        """``on_replaced`` is called for each process that is replaced, in the thread of :meth:`run`."""
        self._setup, self._count, self._batch_size, self._on_replaced = setup, workers, batch_size, on_replaced
        self._workers: list[WorkerProcess] = []
        self._callers: dict[str, CallerInfo] = {}
        self._tap = OutputTap()
        self._todo: dict[str, deque[int]] = {}
        self._alone: deque[int] = deque()
        """Pairs that are tried one at a time."""
        self._jobs: Sequence[Job] = ()
        self._idle_deaths = 0

    @property
    def is_running(self) -> bool:
        """Whether there are processes."""
        return bool(self._workers)

    def fields(self) -> dict[str, tuple[str, ...]]:
        """Verifier's name → what its function asks for, once the processes run."""
        return {name: caller.fields for name, caller in self._callers.items()}

    def start(self) -> None:
        """Start the processes. Raises :class:`ImportFailed` if a verifier cannot be imported."""
        try:
            for _ in range(self._count):
                self._workers.append(WorkerProcess(self._setup, self._tap))
            for worker in self._workers:
                worker.await_start()
        except BaseException:
            self.close()
            raise
        self._callers = self._workers[0].callers

    def close(self) -> None:
        """Stop the processes."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def run(self, jobs: Sequence[Job], on_outcome: Callable[[int, Outcome], None]) -> None:
        """Judge ``jobs``; call ``on_outcome`` with the index and outcome of each, in any order.

        If only errors came for 10 deadlines, the waiting pairs get the last error. A call that fails closes the pool,
        so that no process continues with pairs for which nobody waits.
        """
        self._jobs, self._todo, self._alone, self._idle_deaths = jobs, {}, deque(), 0
        for number, (name, _) in enumerate(jobs):
            self._todo.setdefault(name, deque()).append(number)
        sizes = {name: self._size_of_batch(name, len(numbers)) for name, numbers in self._todo.items()}
        num_done, num_errors, last_verdict = 0, 0, running_time()
        try:
            while num_done < len(jobs):
                outcomes = self._hand_out(sizes)
                outcomes += [] if outcomes else self._await_outcomes()
                num_errors += len(outcomes)
                if any(error is None for _, (_, _, error) in outcomes):
                    num_errors, last_verdict = 0, running_time()
                elif outcomes and self._is_hopeless(num_errors, running_time() - last_verdict):
                    outcomes += self._give_up(outcomes[-1][1][2])
                for number, outcome in outcomes:
                    on_outcome(number, outcome)
                num_done += len(outcomes)
        except BaseException:
            self.close()
            raise

    def _is_hopeless(self, num_errors: int, seconds: float) -> bool:
        # Both: errors can be cheap, and a process can take its time to import a verifier again.
        return num_errors >= _GIVE_UP_DEADLINES and seconds > _GIVE_UP_DEADLINES * self._setup.deadline_s

    def _give_up(self, error: str | None) -> list[tuple[int, Outcome]]:
        waiting = [number for queue in (self._alone, *self._todo.values()) for number in queue]
        for queue in (self._alone, *self._todo.values()):
            queue.clear()
        problem = f"not tried: no verdict within {_GIVE_UP_DEADLINES} × deadline_s, the last error: {error}"
        return [(number, (False, 0.0, problem)) for number in waiting]

    def _size_of_batch(self, name: str, count: int) -> int:
        if self._callers[name].mode == "one":
            return max(1, min(_MAX_BATCH, count // (4 * self._count)))
        return max(1, min(self._batch_size, -(-count // self._count)))

    def _hand_out(self, sizes: dict[str, int]) -> list[tuple[int, Outcome]]:
        """Give idle processes their next batches; return outcomes of pairs that cannot be sent."""
        unsent: list[tuple[int, Outcome]] = []
        for worker in list(self._workers):
            if not worker.is_ready or worker.pending:
                continue
            name, items, failed = self._next_batch(sizes)
            unsent += failed
            if not items:
                continue
            try:
                worker.give(name, items)
            except WorkerDied as death:
                self._count_idle_death(death)
                self._put_back(name, [number for number, _ in items])
                self._replace(worker)
        return unsent

    def _next_batch(self, sizes: dict[str, int]) -> tuple[str, list[Item], list[tuple[int, Outcome]]]:
        if self._alone:
            source, size = self._alone, 1
        else:
            source, size = next(((q, sizes[name]) for name, q in self._todo.items() if q), (self._alone, 0))
        name, num_bytes = "", 0
        items: list[Item] = []
        failed: list[tuple[int, Outcome]] = []
        while source and len(items) < size and num_bytes < _MAX_BATCH_BYTES:
            number = source.popleft()
            name, pair = self._jobs[number]
            try:
                payload = pickle.dumps(values_of(pair, self._callers[name].fields))
            except Exception as error:  # noqa: BLE001 (pickling runs code of the answer's class: reported)
                failed.append((number, (False, 0.0, f"cannot be sent to the verifier: {describe(error)}")))
                continue
            items.append((number, payload))
            num_bytes += len(payload)
        return name, items, failed

    def _await_outcomes(self) -> list[tuple[int, Outcome]]:
        """Wait until some process has sent something, has ended or is overdue; return the outcomes."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        timeout_s = max(0.0, min(deadlines) - time.monotonic()) + 0.001
        wait([waited for worker in self._workers for waited in (worker.connection, worker.end)], timeout_s)
        done: list[tuple[int, Outcome]] = []
        for worker in list(self._workers):
            ending = worker.ending_if_dead()
            if worker.is_overdue():
                done += self._bury(worker, ending or late_error(self._setup.deadline_s))
            elif ending and not worker.is_ready:
                worker.await_start()
            elif not worker.connection.poll():
                # A child that outlives the process keeps the connection open, so there is no end of file.
                done += self._bury(worker, ending) if ending else []
            elif not worker.is_ready:
                worker.receive_start()
            else:
                done += self._receive(worker)
        return done

    def _receive(self, worker: WorkerProcess) -> list[tuple[int, Outcome]]:
        try:
            number, outcome = worker.receive()
        except WorkerDied as death:
            return self._bury(worker, str(death))
        if number == WHOLE_BATCH:
            self._alone.extend(worker.pending)
            worker.pending.clear()
            return []
        self._idle_deaths = 0
        return [(number, outcome)]

    def _bury(self, worker: WorkerProcess, error: str) -> list[tuple[int, Outcome]]:
        """Replace a process that is overdue or dead. The pair it worked on gets ``error``; its other pairs are
        requeued."""
        if not worker.is_ready:
            raise ImportFailed(dict.fromkeys(self._setup.paths, "its import takes too long"))
        pending = list(worker.pending)
        self._replace(worker)
        if not pending:
            self._count_idle_death(error)
            return []
        if worker.mode != "one" and len(pending) > 1:  # one of them did it
            self._alone.extend(pending)
            return []
        self._put_back(self._jobs[pending[0]][0], pending[1:])
        self._idle_deaths = 0
        return [(pending[0], (False, 0.0, error))]

    def _put_back(self, name: str, numbers: Sequence[int]) -> None:
        self._todo[name].extendleft(reversed(numbers))

    def _count_idle_death(self, death: object) -> None:
        logger.warning("%s while idle; starting another", death)
        self._idle_deaths += 1
        if self._idle_deaths > _MAX_IDLE_DEATHS:
            problem = f"{self._idle_deaths} of its processes ended before they judged anything, the last: {death}"
            raise ImportFailed(dict.fromkeys(self._setup.paths, problem))

    def _replace(self, worker: WorkerProcess) -> None:
        worker.stop()
        self._on_replaced()
        self._workers[self._workers.index(worker)] = WorkerProcess(self._setup, self._tap)
