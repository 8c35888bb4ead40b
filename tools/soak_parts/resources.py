"""The resources of a run's processes: samples of them, and their growth over a process's life."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

from tools.soak_parts.processes import RunProcesses

RESOURCES = ("rss", "descriptors", "threads")
_SETTLES_S = 180.0
"""The first part of a process's life, which is not compared: its caches fill and its threads start. A process must live
twice as long to be measured."""
_HEAP_SETTLES_S = 600.0
"""The same for the memory of a rank: the heap of a small model grows by some percent for as long as that."""
_ENDS_S = 30.0
"""The last part of a life, which is not compared either: a process that ends gives back what it has."""
_LEAST_SAMPLES = 20
"""Samples of each half of it that are enough to meet the process when it is idle."""
_TITLE = "sglang::"
"""SGLang gives the processes below a server such names: ``sglang::scheduler``, ``sglang::detokenizer``."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The resources of one process at one moment."""

    role: str
    pid: int
    born: float
    """Time at which the process was started."""
    time: float
    rss: int
    descriptors: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The growth of the processes of one role in one run."""

    processes: int
    longest_s: float
    """The longest life of a process of the role."""
    measured: Mapping[str, int]
    """Resource → processes that lived for long enough."""
    middle: Mapping[str, float]
    """Resource → growth of the middle one of these, of two the larger: ``rss`` as a share, the others as a number. All
    processes of a role do the same, so a leak shows in most of them, and chance does not."""


def take_samples(found: RunProcesses) -> Iterator[Sample]:
    """Yield a sample of each process that has a role."""
    for role, one in _roles(found):
        with contextlib.suppress(psutil.Error), one.oneshot():
            yield Sample(
                role=role,
                pid=one.pid,
                born=one.create_time(),
                time=time.time(),
                rss=one.memory_info().rss,
                descriptors=one.num_fds(),
                threads=one.num_threads(),
            )


def _roles(found: RunProcesses) -> Iterator[tuple[str, psutil.Process]]:
    yield from (("server", one) for one in found.servers)
    yield from (("verifier", one) for one in found.verifiers)
    for one in found.ranks:
        with contextlib.suppress(psutil.Error):
            yield f"rank {one.environ().get('RANK', '0')}", one
    for one in found.server_workers():
        with contextlib.suppress(psutil.Error):
            title = " ".join(one.cmdline()).strip()
            if title.startswith(_TITLE):  # it gets its name after some seconds
                yield title.removeprefix(_TITLE), one


def measure_growth(samples: Iterable[Sample]) -> dict[str, Growth]:
    """Return the growth of each role."""
    lives: dict[tuple[str, int, float], list[Sample]] = {}
    for sample in samples:
        lives.setdefault((sample.role, sample.pid, sample.born), []).append(sample)
    by_role: dict[str, list[list[Sample]]] = {}
    for (role, _, _), life in lives.items():
        by_role.setdefault(role, []).append(life)
    return {role: _growth_of(of_role) for role, of_role in sorted(by_role.items())}


def _growth_of(lives: Sequence[Sequence[Sample]]) -> Growth:
    grown = {
        name: [one for one in (_growth_of_one(life, name) for life in lives) if one is not None] for name in RESOURCES
    }
    return Growth(
        processes=len(lives),
        longest_s=max(life[-1].time - life[-1].born for life in lives),
        measured={name: len(found) for name, found in grown.items()},
        middle={name: statistics.median_high(found) for name, found in grown.items() if found},
    )


def _growth_of_one(life: Sequence[Sample], resource: str) -> float | None:
    """Compare two halves of a life, without the time in which it settles or its first third, whichever is longer.

    The median memory of each half counts. Numbers of descriptors and threads grow by as much as both the least and the
    median of a half do: requests that come and go do not change the least, and a server that is gone for a while, with
    its connections, does not change the median. Return None if the life was too short.
    """
    born, long_s = life[-1].born, life[-1].time - life[-1].born
    settles_s = settling_time(life[-1].role, resource)
    begin, end = born + max(settles_s, long_s / 3), born + long_s - _ENDS_S
    middle = (begin + end) / 2
    first = [getattr(one, resource) for one in life if begin <= one.time < middle]
    second = [getattr(one, resource) for one in life if middle <= one.time < end]
    if long_s < 2 * settles_s or min(len(first), len(second)) < _LEAST_SAMPLES:
        return None
    if resource == "rss":
        return float(statistics.median(second) / statistics.median(first) - 1)
    return float(min(min(second) - min(first), statistics.median(second) - statistics.median(first)))


def settling_time(role: str, resource: str) -> float:
    """Return the seconds from the start of a process in which the resource may grow."""
    return _HEAP_SETTLES_S if role.startswith("rank ") and resource == "rss" else _SETTLES_S


def growth_violations(by_run: Mapping[str, Mapping[str, Growth]], *, max_growth: float, max_more: int) -> Iterator[str]:
    """Yield a line for each role that grew in a run, or could be measured in none.

    Args:
        by_run: run → role → growth.
        max_growth: of memory, as a share.
        max_more: descriptors or threads.
    """
    for run, roles in by_run.items():
        for role, growth in roles.items():
            for name, value in growth.middle.items():
                if name == "rss" and value > max_growth:
                    yield f"{run}: {role}: memory grew by {value:.1%}"
                elif name != "rss" and value > max_more:
                    yield f"{run}: {role}: {value:g} {name} more"
    for role in sorted({role for roles in by_run.values() for role in roles}):
        growths = [roles[role] for roles in by_run.values() if role in roles]
        longest = max(growth.longest_s for growth in growths)
        for name in RESOURCES:
            if not any(growth.measured[name] for growth in growths):
                words = f"no process lived for {2 * settling_time(role, name):.0f} s, the longest for {longest:.0f} s"
                yield f"{role}: {name} was not measured: {words}"
