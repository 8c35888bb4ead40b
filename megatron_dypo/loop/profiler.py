"""Profiles of single steps, and a picture of GPU memory when a rank runs out of it (``profile``).

The parts that :class:`megatron_dypo.metrics.writer.Timings` measures are the ranges of a profile: ``step``, and in it
``gen``, ``reward``, ``old_log_prob``, ``ref_log_prob``, ``update_actor`` (with ``forward_backward`` and
``optimizer_step``) and ``refit``. The part ``step`` begins and ends a profile, so that evaluations and checkpoints are
not in it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_dypo.config.profile import ProfileConfig
from megatron_dypo.ending import Cause, cause_of
from megatron_dypo.mcore.compat.memory_history import dump_memory, record_memory
from megatron_dypo.parallel import device

FOLDER = "profile"
log = logging.getLogger("megatron_dypo")

Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """How a GPU spent the time from its first to its last kernel in a step."""

    total_us: float
    communication: float
    """Share of the time in which it communicates."""
    exposed: float
    """Share in which it communicates and does nothing else."""


@dataclass(kw_only=True)
class Profiler:
    """One rank's profiler; :meth:`around` is for ``Timings.around``."""

    cfg: ProfileConfig
    rank: int
    run_dir: Path
    step: Callable[[], int]
    """Returns the number of the step that is being made."""
    note: Callable[[str, float], None]
    """Adds a metric to those of the step (``Timings.note``)."""
    _is_on: bool = field(default=False, init=False)

    def is_due(self) -> bool:
        """Return whether this rank profiles the step of now."""
        return self.rank in self.cfg.ranks and self.step() in self.cfg.steps

    def around(self, part: str) -> contextlib.AbstractContextManager[None]:
        """Return the context of a part: the whole profile for ``step``, else a range in it."""
        if part == "step":
            return self._profile() if self.is_due() else contextlib.nullcontext()
        return self._range(part) if self._is_on else contextlib.nullcontext()

    @contextlib.contextmanager
    def _profile(self) -> Iterator[None]:
        number, made = self.step(), self._torch() if self.cfg.tool == "torch" else self._nsys()
        with made:
            self._is_on = True
            try:
                with self._range(f"step {number}"):
                    yield
            finally:
                self._is_on = False

    @contextlib.contextmanager
    def _torch(self) -> Iterator[None]:
        path = self.run_dir / FOLDER / f"step_{self.step()}_rank_{self.rank}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile(activities=device.profiled_activities(), record_shapes=True) as profile:
            yield
            device.synchronize()
        profile.export_chrome_trace(str(path))
        found = exposed_communication(device.gpu_spans(profile), device.is_communication)
        if found is None:
            log.info("profile of this step: %s", path)
            return
        if self.rank == 0:
            self.note("perf/exposed_communication_ratio", found.exposed)
        log.info(
            "profile of this step: %s; the GPU communicates for %.1f%% of %.2f s, for %.1f%% with nothing beside it",
            path,
            100 * found.communication,
            found.total_us / 1e6,
            100 * found.exposed,
        )

    @contextlib.contextmanager
    def _nsys(self) -> Iterator[None]:
        device.synchronize()
        device.begin_capture()
        try:
            yield
            device.synchronize()
        finally:
            device.end_capture()

    @contextlib.contextmanager
    def _range(self, name: str) -> Iterator[None]:
        if self.cfg.tool == "torch":
            with torch.profiler.record_function(name):
                yield
            return
        device.push_range(name)
        try:
            yield
        finally:
            device.pop_range()


def exposed_communication(
    spans: Iterable[tuple[str, float, float]], is_communication: Callable[[str], bool]
) -> Exposed | None:
    """Return how much of a GPU's time is communication, and how much of that nothing hides; None without spans.

    Args:
        spans: name, beginning and end of each kernel and copy, in microseconds. They may overlap.
    """
    talk, work = list[Span](), list[Span]()
    for name, begin, end in spans:
        (talk if is_communication(name) else work).append((begin, end))
    both = [*talk, *work]
    if not both:
        return None
    total = max(end for _, end in both) - min(begin for begin, _ in both)
    busy, hidden = _covered(talk), _covered(both) - _covered(work)
    return Exposed(total_us=total, communication=busy / total, exposed=hidden / total)


def _covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


@contextlib.contextmanager
def memory_picture(cfg: ProfileConfig, rank: int, run_dir: Path) -> Iterator[None]:
    """Run a block; if it runs out of GPU memory, write a snapshot of all allocations, if the config asks for it."""
    if not cfg.memory_snapshot:
        yield
        return
    if not device.on_gpu():
        log.warning("profile.memory_snapshot=true: does nothing here: this machine has no GPU")
        yield
        return
    record_memory()
    try:
        yield
    except BaseException as error:
        if cause_of(error) is Cause.OUT_OF_MEMORY:
            path = run_dir / FOLDER / f"out_of_memory_rank_{rank}.pickle"
            path.parent.mkdir(parents=True, exist_ok=True)
            dump_memory(path)
            log.warning("rank %d ran out of memory; its allocations are in %s (pytorch.org/memory_viz)", rank, path)
        raise
