"""Every fault in every phase in which it makes sense: the run ends as it must or goes on, and the model is the same.

A fault that ends a start is done in one phase after the other, each in a new start of the same run. All others are done
to one start, in each phase once. Every fault leaves a witness: one line, none for a run without faults.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.faults.matrix import GRADED, LAYOUTS, PHASES, ROWS, Metric
from tests.support.faults.policy_server import policy_servers
from tests.support.faults.run import RANKS, FaultyRun, make_run, require_same

MINUTE_S = 60.0
DONE = (0,) * RANKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that makes a run in a layout."""
    with ExitStack() as stack:

        def make(layout: str) -> FaultyRun:
            folder = tmp_path_factory.mktemp("faults")
            servers = stack.enter_context(policy_servers(2, model_path=str(folder / "model")))
            return make_run(folder, layout, servers)

        yield make


@pytest.fixture(scope="module")
def calm(runs: Any) -> Callable[[str], FaultyRun]:
    """Return a function that gives the run of a layout that meets no fault, and tells of none."""
    made: dict[str, FaultyRun] = {}

    def of(layout: str) -> FaultyRun:
        if layout not in made:
            run = runs(layout)
            end = run.start([])
            assert end.statuses == DONE, end.output
            assert run.witnessed() == []
            texts = [place for row in ROWS.values() for place in row.told_by if not isinstance(place, Metric)]
            assert not any(run.tells(place, end, victim) for place in texts for victim in range(RANKS))
            made[layout] = run
        return made[layout]

    return of


def cells(outcome: str, fast: Sequence[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(kind, layout, marks=() if (kind, layout) in fast else pytest.mark.slow)
        for kind, row in ROWS.items()
        for layout in LAYOUTS
        if row.outcome == outcome
    ]


@pytest.mark.parametrize(("kind", "layout"), cells("ends", [("SIGKILL", "two tensor ranks")]))
def test_a_fault_that_ends_a_start_ends_it_on_every_rank_and_the_next_start_goes_on(
    runs: Any, calm: Any, kind: str, layout: str
) -> None:
    row, run = ROWS[kind], runs(layout)
    for number, phase in enumerate(row.phases):
        # The first rank alone writes the export of so small a model.
        victim = 0 if (kind, phase) == ("disk full", "export") else number % RANKS
        end = run.start([run.injection(kind, phase, victim)])
        assert len(run.witnessed()) == number + 1, end.output
        assert run.witnessed()[-1]["phase"] == phase
        assert end.statuses[victim] in row.victim, f"{phase}: {end.output}"
        assert end.statuses[1 - victim] in row.others, f"{phase}: {end.output}"
        assert end.since_s(run.witnessed()[-1]["at"]) < row.deadline_s, phase
        if end.statuses != DONE:
            for place in row.told_by:
                assert run.tells(place, end, victim), f"{phase}: {place}: {end.output}"
    end = run.start([])
    assert end.statuses == DONE, end.output
    require_same(run, calm(layout))


@pytest.mark.parametrize(("kind", "layout"), cells("goes on", []))
def test_a_run_goes_on_after_a_fault_and_ends_as_if_it_had_not_happened(
    runs: Any, calm: Any, kind: str, layout: str
) -> None:
    row, run = ROWS[kind], runs(layout)
    # Servers and verifiers are those of the first rank; a stopped rank is named by the other one.
    victim = 1 if kind == "SIGSTOP" else 0
    injections = [run.injection(kind, phase, victim, after_step=PHASES.index(phase) // 2) for phase in row.phases]
    named: list[int] = []

    def look(processes: Sequence[Any]) -> None:
        run.see_records()
        stalls = run.log().count("W megatron_dypo: stall: rank 1") if kind == "SIGSTOP" else 0
        if stalls > len(named):
            named.append(stalls)
            os.kill(processes[1].pid, signal.SIGCONT)

    end = run.start(injections, look)
    assert end.statuses == DONE, end.output
    assert [one["phase"] for one in run.witnessed()] == list(row.phases)
    usual_s = calm(layout).usual_step_s()
    assert all(silence_s < row.deadline_s + usual_s for silence_s in run.silences_s(end)), run.silences_s(end)
    for place in row.told_by:
        assert run.tells(place, end, victim), f"{place}: {run.log()}"
    if kind == "SIGSTOP":
        assert len(named) == len(row.phases)
    met = {one for server in run.servers for one in server.met}
    if met:
        assert {(phase, "/generate") for phase in GRADED} <= met, "rollouts and evaluation themselves met the fault"
    if not (row.may_lose_verdicts and run.num_without_verdict()):
        require_same(run, calm(layout))


@pytest.mark.slow
def test_a_run_waits_a_minute_for_servers_that_all_answer_503_and_loses_nothing(runs: Any, calm: Any) -> None:
    layout = "two replicas"
    run, kind = runs(layout), "a server answers 503"
    end = run.start([run.injection(kind, "rollouts", 0, after_step=1, seconds=MINUTE_S)], lambda _: run.see_records())
    assert end.statuses == DONE, end.output
    (witness,) = run.witnessed()
    assert witness["phase"] == "rollouts"
    for server in run.servers:
        assert run.recorded_at[witness["steps"]] > server.until > witness["at"] + MINUTE_S - 10.0
        assert server.met.count(("rollouts", "/generate")) > 1
    require_same(run, calm(layout))
