"""The growth of processes that a soak measures, on lives that are long or short, level or growing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from tests.support.fake_sglang import wait_until
from tests.support.soak_cases import EVERY_S, life
from tools.soak_parts.processes import RunProcesses
from tools.soak_parts.resources import (
    Growth,
    Sample,
    growth_violations,
    measure_growth,
    settling_time,
    take_samples,
)

WAITS = "import threading; threading.Event().wait()"
NOTHING = {"rss": 0.0, "descriptors": 0.0, "threads": 0.0}
SETTLED_S = settling_time("server", "rss")
HEAP_SETTLED_S = settling_time("rank 0", "rss")


def in_seconds(seconds: float, before: int, after: int, change_s: float) -> list[int]:
    """Return a value for each sample: ``before``, and from ``change_s`` on ``after``."""
    return [before if EVERY_S * n < change_s else after for n in range(int(seconds / EVERY_S) + 1)]


def test_the_growth_of_start_up_does_not_count() -> None:
    found = measure_growth(life(in_seconds(2 * SETTLED_S, 100, 900, SETTLED_S), role="server"))["server"]
    assert (found.processes, found.longest_s) == (1, 2 * SETTLED_S)
    assert found.measured == {"rss": 1, "descriptors": 1, "threads": 1}
    assert found.middle == NOTHING


def test_the_heap_of_a_rank_settles_for_longer() -> None:
    found = measure_growth(life(in_seconds(2 * SETTLED_S, 100, 900, SETTLED_S)))["rank 0"]
    assert found.measured == {"rss": 0, "descriptors": 1, "threads": 1}
    assert "rss" not in found.middle
    found = measure_growth(life(in_seconds(2 * HEAP_SETTLED_S, 100, 900, HEAP_SETTLED_S)))["rank 0"]
    assert found.middle == NOTHING


def test_nor_does_that_of_the_first_third_of_a_long_life() -> None:
    assert measure_growth(life(in_seconds(3000.0, 100, 900, 990.0)))["rank 0"].middle["rss"] == 0.0


def test_growth_after_it_counts_where_it_shows_in_half_of_the_processes() -> None:
    level, grows = in_seconds(1200.0, 100, 100, 0.0), in_seconds(1200.0, 100, 103, 900.0)
    samples = [*life(level, pid=1), *life(grows, pid=2), *life(level, role="server", pid=3)]
    found = measure_growth(samples)
    assert found["rank 0"].middle["rss"] == pytest.approx(0.03)
    assert found["rank 0"].measured["rss"] == 2
    assert found["server"].middle["rss"] == 0.0
    assert measure_growth([*samples, *life(level, pid=4)])["rank 0"].middle["rss"] == 0.0, "that of one is chance"


@pytest.mark.parametrize("resource", ["descriptors", "threads"])
def test_descriptors_and_threads_grow_by_a_number(resource: str) -> None:
    fields: Any = {resource: in_seconds(1200.0, 50, 62, 700.0)}
    assert measure_growth(life([100] * 601, **fields))["rank 0"].middle[resource] == 12


def test_a_process_that_ends_hides_no_growth() -> None:
    descriptors = [*in_seconds(1172.0, 50, 62, 700.0), *[3] * 14]
    assert measure_growth(life([100] * 601, descriptors=descriptors))["rank 0"].middle["descriptors"] == 12


def test_work_that_comes_and_goes_is_no_growth() -> None:
    busy = [10 + 128 * (n % 8 != 0 and n > 300) for n in range(601)]
    assert measure_growth(life([100] * 601, descriptors=busy))["rank 0"].middle["descriptors"] == 0


def test_the_connections_that_come_back_with_a_server_are_no_growth() -> None:
    outage = [10 + 22 * (not 250 <= n < 300) for n in range(601)]
    assert measure_growth(life([100] * 601, descriptors=outage))["rank 0"].middle["descriptors"] == 0


def test_a_life_that_was_too_short_or_seldom_sampled_is_not_measured() -> None:
    whole = life(in_seconds(2 * SETTLED_S, 100, 900, 200.0), role="server")
    found = measure_growth(whole[:-1])["server"]
    assert (found.processes, found.longest_s) == (1, 2 * SETTLED_S - EVERY_S)
    assert found.measured == {"rss": 0, "descriptors": 0, "threads": 0}
    assert found.middle == {}
    assert measure_growth(whole[::9])["server"].middle == {}


def test_processes_with_the_same_number_are_told_apart_by_their_birth() -> None:
    first = life([100] * 100, role="server")
    second = [Sample(**{**vars(one), "born": 2000.0, "time": one.time + 1000.0}) for one in first]
    found = measure_growth([*first, *second])["server"]
    assert (found.processes, found.longest_s, found.middle) == (2, 198.0, {})


def grown(longest_s: float = 400.0, **middle: float) -> Growth:
    values = {**NOTHING, **middle}
    return Growth(processes=3, longest_s=longest_s, measured=dict.fromkeys(values, 2), middle=values)


def not_measured(longest_s: float) -> Growth:
    return Growth(processes=5, longest_s=longest_s, measured=dict.fromkeys(NOTHING, 0), middle={})


def lines(**by_run: dict[str, Growth]) -> list[str]:
    return list(growth_violations(by_run, max_growth=0.02, max_more=8))


def test_each_resource_has_a_bound() -> None:
    assert lines(calm={"rank 0": grown(rss=0.02, descriptors=8, threads=8)}) == []
    assert lines(faults={"rank 0": grown(rss=0.021)}) == ["faults: rank 0: memory grew by 2.1%"]
    assert lines(faults={"server": grown(descriptors=9)}) == ["faults: server: 9 descriptors more"]
    assert lines(calm={"verifier": grown(threads=9)}) == ["calm: verifier: 9 threads more"]


def test_a_role_must_be_measured_in_one_of_the_runs() -> None:
    assert lines(calm={"rank 0": grown()}, faults={"rank 0": not_measured(70.0)}) == []
    missing = lines(calm={"rank 0": not_measured(299.0)}, faults={"rank 0": not_measured(70.0)})
    assert missing == lines(calm={}, faults={"rank 0": not_measured(299.0)})
    assert missing == [
        f"rank 0: {name} was not measured: no process lived for {least} s, the longest for 299 s"
        for name, least in {"rss": 1200, "descriptors": 360, "threads": 360}.items()
    ]


def test_a_sample_is_that_of_the_process() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], env={**os.environ, "RANK": "3"}) as process:
        one, own = psutil.Process(process.pid), psutil.Process()
        run = RunProcesses(command=own, launcher=None, ranks=(one,), servers=(), verifiers=(own,), all=(own, one))
        wait_until(lambda: one.environ().get("RANK") == "3", "it has begun", 60.0)
        samples = {sample.role: sample for sample in take_samples(run)}
        process.kill()
        process.wait(60)
        assert [sample.role for sample in take_samples(run)] == ["verifier"], "the other has ended"
    rank = samples["rank 3"]
    assert (rank.pid, samples["verifier"].pid) == (process.pid, os.getpid())
    assert rank.born <= rank.time
    assert rank.rss > 0
    assert samples["verifier"].rss > 2**20
    assert rank.threads == 1
    assert rank.descriptors >= 3


def test_the_workers_of_a_server_have_roles_of_their_own() -> None:
    command = ["bash", "-c", f"exec -a sglang::scheduler {sys.executable} -c '{WAITS}'"]
    with subprocess.Popen(command) as worker, subprocess.Popen([sys.executable, "-c", WAITS]) as helper:
        own = psutil.Process()
        run = RunProcesses(command=own, launcher=None, ranks=(), servers=(own,), verifiers=(), all=())
        end, roles = time.monotonic() + 60.0, dict[str, int]()
        while len(roles) < 2 and time.monotonic() < end:
            roles = {sample.role.split()[0]: sample.pid for sample in take_samples(run)}
        for process in (worker, helper):
            process.kill()
            process.wait(60)
    assert roles == {"server": os.getpid(), "scheduler": worker.pid}
