"""A run that suffers faults until it is done: it is started again after each end, and watched all the time."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from megatron_dypo.ending import Cause
from megatron_dypo.metrics.records import METRICS_FILE, read_metrics
from megatron_dypo.processes.children import signal_at_parents_end
from tools.soak_parts.faults import DAMAGE, FAULTS, Fault, flip_a_bit
from tools.soak_parts.processes import RunProcesses, find_processes
from tools.soak_parts.resources import Sample, take_samples

_LOOK_EVERY_S = 0.5
_SAMPLE_EVERY_S = 2.0
_LAST_START_S = 120.0
_LEAVE_S = 60.0
"""Longest life of a run's processes after its command has ended."""
_FINAL = {Cause.DONE.status, Cause.BAD_INPUT.status, Cause.NOT_FINITE.status, Cause.NOTHING_LEFT.status}
"""Exit statuses after which the run is not started again."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A fault that happened."""

    kind: str
    words: str
    time: float
    start: int
    step: int
    """The last step on record before it."""


@dataclass(kw_only=True)
class Story:
    """All that happened."""

    events: list[Event] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Exit status of each start."""
    left_behind: list[str] = field(default_factory=list)
    """Processes that outlived their run."""
    back_s: dict[int, float] = field(default_factory=dict)
    """Number of an event → seconds until the next step was on record."""

    def as_json(self) -> dict[str, Any]:
        return {
            "events": [{**asdict(event), "back_s": self.back_s.get(n)} for n, event in enumerate(self.events)],
            "ends": self.ends,
            "left_behind": self.left_behind,
        }


def outlive(processes: Iterable[psutil.Process], patience_s: float) -> list[psutil.Process]:
    """Wait until these processes have ended; return those that live on. (``psutil.wait_procs`` fails now and then: a
    process that ends while it is opened is an OSError.)"""
    end, alive = time.monotonic() + patience_s, list(processes)
    while (alive := [one for one in alive if _lives(one)]) and time.monotonic() < end:
        time.sleep(_LOOK_EVERY_S)
    return alive


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


class Launch(Protocol):
    """How a run is started, found and stopped."""

    @property
    def command(self) -> Sequence[str]:
        """Return what starts the run, and ends with it."""
        ...

    @property
    def faults(self) -> Mapping[str, Fault]:
        """Return name → fault, each as likely as another."""
        ...

    @property
    def damaged(self) -> set[str]:
        """Return the names of the checkpoints that were damaged, to which others are added."""
        ...

    def find(self, command: psutil.Process) -> RunProcesses:
        """Return the run's processes. Raises psutil.NoSuchProcess if the command lives no more."""
        ...

    def stop(self, command: psutil.Popen) -> int:
        """Ask the run to stop; return its exit status once it has saved and ended."""
        ...


class LocalCommand:
    """A run that is a command of this host."""

    faults: Mapping[str, Fault] = FAULTS

    def __init__(self, config: Path, overrides: Sequence[str]) -> None:
        self.command = [sys.executable, "-m", "megatron_dypo.cli", "train", str(config), *overrides]
        self.damaged = set[str]()

    def find(self, command: psutil.Process) -> RunProcesses:
        return find_processes(command)

    def stop(self, command: psutil.Popen) -> int:
        command.terminate()
        return int(command.wait())


class Soak:
    """One run under faults."""

    def __init__(
        self,
        launch: Launch,
        run_dir: Path,
        *,
        mean_gap_s: float,
        max_faults: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._launch, self._run_dir, self._say = launch, run_dir, say
        self._mean_gap_s, self._max_faults = mean_gap_s, max_faults
        self._rng = random.Random(seed)
        self.story = Story()

    def run(self, deadline_s: float) -> Story:
        """Start the run again and again until it is done, and do faults to it. When the time is over, it is stopped."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            self._damage()
            status = self._one_start(end)
            self.story.ends.append(status)
            self._say(f"start {len(self.story.ends)} ended with status {status}")
            if status in _FINAL:
                return self.story
        if self.story.ends[-1] != Cause.STOPPED.status:
            # The last fault left it ended. It must be able to go on.
            self._max_faults = 0
            self.story.ends.append(self._one_start(time.monotonic() + _LAST_START_S))
        return self.story

    def _one_start(self, end: float) -> int:
        log = self._run_dir.with_name(f"{self._run_dir.name}.log")
        with log.open("ab") as output:
            process = psutil.Popen(
                self._launch.command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # A run must not outlive this tool. The thread of this call lives as long as the soak.
                preexec_fn=functools.partial(signal_at_parents_end, signal.SIGTERM, os.getpid()),
            )
        stop = threading.Event()
        injector = threading.Thread(target=self._do_faults, args=(process, stop), daemon=True)
        injector.start()
        known: dict[int, psutil.Process] = {}
        sampled = 0.0
        try:
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(psutil.Error):
                    found = self._launch.find(process)
                    known |= {one.pid: one for one in found.all}
                    if time.monotonic() - sampled >= _SAMPLE_EVERY_S:
                        sampled = time.monotonic()
                        self.story.samples.extend(take_samples(found))
                self._note_steps()
                time.sleep(_LOOK_EVERY_S)
        finally:
            stop.set()
            injector.join()
            status = self._launch.stop(process) if process.poll() is None else int(process.returncode)
        for one in outlive(known.values(), _LEAVE_S):
            with contextlib.suppress(psutil.Error):
                self.story.left_behind.append(f"start {len(self.story.ends) + 1}: {' '.join(one.cmdline())[:200]}")
                one.kill()
        return status

    def _do_faults(self, command: psutil.Process, stop: threading.Event) -> None:
        faults = self._launch.faults
        while not stop.wait(self._rng.expovariate(1.0 / self._mean_gap_s)):
            if len(self.story.events) >= self._max_faults:
                return
            kind = self._rng.choice(list(faults))
            step, moment = self._step(), time.time()
            words = None
            with contextlib.suppress(psutil.Error):  # a process has just ended: another fault follows
                words = faults[kind].do(self._launch.find(command), self._rng, stop)
            if words is not None:
                self._note(kind, words, moment, step)
                if faults[kind].outcome != "goes on":
                    return

    def _damage(self) -> None:
        may_be = self.story.ends and len(self.story.events) < self._max_faults
        if not may_be or self._rng.random() >= 0.25:
            return
        if words := flip_a_bit(self._run_dir, self._rng, self._launch.damaged):
            self._note(DAMAGE, words, time.time(), self._step())

    def _note(self, kind: str, words: str, moment: float, step: int) -> None:
        event = Event(kind=kind, words=words, time=moment, start=len(self.story.ends) + 1, step=step)
        self.story.events.append(event)
        self._say(f"fault {len(self.story.events)}, step {step}: {kind}: {words}")

    def _note_steps(self) -> None:
        if len(self.story.back_s) == len(self.story.events):
            return
        records = read_metrics(self._run_dir / METRICS_FILE) if (self._run_dir / METRICS_FILE).is_file() else []
        for number, event in enumerate(self.story.events):
            later = [record["time"] for record in records if record["time"] > event.time]
            if number not in self.story.back_s and later:
                self.story.back_s[number] = min(later) - event.time

    def _step(self) -> int:
        path = self._run_dir / METRICS_FILE
        records = read_metrics(path) if path.is_file() else []
        return int(records[-1]["step"]) if records else 0
