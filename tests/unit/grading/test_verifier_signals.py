"""Signals in verifier processes: requests to stop a run, and the alarms of verifiers."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.naming import import_path
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.grading.workers.output import OutputTap
from megatron_dypo.grading.workers.process import WorkerProcess
from megatron_dypo.grading.workers.worker import Setup
from megatron_dypo.processes.children import STOP
from megatron_dypo.types import Verdict

HERE = "tests.support.grading.verifiers"
RIGHT = Verdict(is_correct=True, reward=1.0)


def _config(function: str, **changes: Any) -> GradingConfig:
    return GradingConfig(**{"verifier": f"{HERE}:{function}", "workers": 1, "deadline_s": 1.0, **changes})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_that_asks_the_run_to_stop_leaves_its_verifiers_at_work(number: signal.Signals) -> None:
    with Verifier(_config("pid")) as verifier:
        (before,) = verifier.verify([("", "")])
        os.kill(int(before.reward), number)
        assert verifier.verify([("", "")] * 3) == [before] * 3


def test_processes_that_a_verifier_starts_can_be_stopped_as_usual() -> None:
    with Verifier(_config("strange")) as strange:
        assert strange.verify([("terminate children", "")]) == [RIGHT]


def test_a_signal_to_stop_does_not_end_a_process_that_is_starting() -> None:
    setup = Setup(
        paths={"exact": import_path("exact")}, options={}, built_in=frozenset(), deadline_s=5.0, start_deadline_s=60.0
    )
    worker = WorkerProcess(setup, OutputTap())
    try:
        for number in STOP:
            os.kill(worker.pid, number)
        assert worker.connection.poll(60.0)
        worker.receive_start()
        assert worker.is_ready
    finally:
        worker.stop()


def test_a_module_that_sets_its_own_alarm_keeps_it() -> None:
    with Verifier(_config("", verifier="tests.support.grading.own_alarm:limited", deadline_s=20.0)) as verifier:
        first, good, second = verifier.verify([("hang", ""), ("a", "a"), ("hang", "")])
    assert good == RIGHT
    assert (first.error or "").startswith("TimeoutError: my own limit (own_alarm.py:")
    assert second.error == first.error


def test_a_verifier_that_ignores_the_alarm_does_not_do_so_for_the_next_pair() -> None:
    with Verifier(_config("strange")) as strange:
        assert strange.verify([("alarm", "alarm"), ("alarm state", "")]) == [RIGHT, RIGHT]
