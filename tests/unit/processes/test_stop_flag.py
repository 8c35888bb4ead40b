"""A flag that wakes every waiting thread."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

from megatron_dypo.processes.stop_requests import StopFlag


def test_a_callback_is_called_once_whenever_it_comes() -> None:
    flag, calls = StopFlag(), []
    with flag.calling(lambda: calls.append("early")):
        assert not flag.is_set()
        assert calls == []
        flag.set()
        flag.set()
    assert flag.is_set()
    with flag.calling(lambda: calls.append("late")):
        pass
    assert calls == ["early", "late"]


def test_a_callback_whose_block_has_ended_is_not_called() -> None:
    flag, calls = StopFlag(), []
    with flag.calling(lambda: calls.append("gone")):
        pass
    flag.set()
    assert calls == []


def test_a_flag_that_is_set_in_a_thread_wakes_an_event_loop() -> None:
    flag = StopFlag()

    async def wait() -> None:
        woken, loop = asyncio.Event(), asyncio.get_running_loop()
        with flag.calling(lambda: loop.call_soon_threadsafe(woken.set)):
            threading.Thread(target=flag.set).start()
            await asyncio.wait_for(woken.wait(), 10)

    asyncio.run(wait())


def test_a_request_to_stop_sets_the_flag_of_the_process() -> None:
    code = """
import os, signal, threading
from megatron_dypo.processes import stop_requests
stop_requests.hold_requests()
woken = threading.Event()
ignore = lambda number: None
stop_requests.listen(stop_requests.Answers(on_request=ignore, on_early_request=ignore, on_insistence=ignore))
with stop_requests.STOP.calling(woken.set):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert woken.wait(20)
print(stop_requests.STOP.is_set())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
