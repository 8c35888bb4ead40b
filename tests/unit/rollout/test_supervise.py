"""A thread that looks after servers, and everything that may happen to it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_dypo.rollout.server import supervise
from megatron_dypo.rollout.server.process import ServerDiedError, ServerProcess
from megatron_dypo.rollout.server.supervise import Supervised, Supervisor
from tests.support.fake_sglang import wait_until


@pytest.fixture
def ended(tmp_path: Path) -> ServerProcess:
    """Make a server that has ended with status 3."""
    process = ServerProcess("server", "http://127.0.0.1:9", tmp_path / "server.log", grace_s=0.1)
    process.start([sys.executable, "-c", "raise SystemExit(3)"], {}, "key")
    wait_until(lambda: process.ending() is not None, "it has ended")
    return process


def test_a_server_that_cannot_be_started_again_has_died_once_more(ended: ServerProcess) -> None:
    starts: list[int] = []

    def no_descriptors() -> None:
        starts.append(1)
        raise OSError(24, "Too many open files")

    supervisor = Supervisor([Supervised(ended, no_descriptors, lambda: False, restarts=2, deadline_s=60.0)])
    wait_until(lambda: supervisor.servers[0].given_up is not None, "it is given up")
    with pytest.raises(ServerDiedError, match="no SGLang server is left"):
        supervisor.check()
    supervisor.stop()
    assert len(starts) == 2


@pytest.mark.parametrize(("is_healthy", "num_starts"), [(True, 5), (False, 2)])
def test_a_server_that_has_served_for_long_may_be_started_again_as_often_as_at_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_healthy: bool,
    num_starts: int,
) -> None:
    caplog.set_level("INFO")
    process = ServerProcess("server", "http://127.0.0.1:9", tmp_path / "server.log", grace_s=0.1)
    starts: list[int] = []

    def start() -> None:
        starts.append(1)
        # After the second and the third start it serves for long: each time a new row of two begins.
        monkeypatch.setattr(supervise, "_STEADY_S", -1.0 if len(starts) in (2, 3) else 600.0)
        wait = f"import os, time\nwhile not os.path.exists({str(end_of(len(starts)))!r}): time.sleep(0.05)"
        process.start([sys.executable, "-c", f"{wait}\nraise SystemExit(3)"], {}, "key")

    def end_of(number: int) -> Path:
        return tmp_path / f"end-{number}"

    def has_ended_for_good() -> bool:
        if not is_healthy or caplog.text.count("runs again") == len(starts):
            end_of(len(starts)).touch()
        return supervisor.servers[0].given_up is not None

    end_of(0).touch()
    process.start([sys.executable, "-c", "raise SystemExit(3)"], {}, "key")
    supervisor = Supervisor([Supervised(process, start, lambda: is_healthy, restarts=2, deadline_s=60.0)])
    wait_until(has_ended_for_good, "it is given up", 60)
    supervisor.stop()
    assert len(starts) == num_starts


def test_an_error_of_the_thread_is_raised_where_servers_are_checked(ended: ServerProcess) -> None:
    def broken() -> bool:
        raise KeyError("our own bug")

    supervisor = Supervisor([Supervised(ended, lambda: None, broken, restarts=1000, deadline_s=60.0)])

    def is_noticed() -> bool:
        try:
            supervisor.check()
        except RuntimeError as error:
            causes.append(error.__cause__)
        return bool(causes)

    causes: list[BaseException | None] = []
    wait_until(is_noticed, "the check raises")
    supervisor.stop()
    assert isinstance(causes[0], KeyError)


def test_whoever_waits_for_a_loss_is_told_of_it(ended: ServerProcess) -> None:
    supervisor = Supervisor([Supervised(ended, lambda: None, lambda: False, restarts=0, deadline_s=60.0)])
    with pytest.raises(ServerDiedError, match=r"no SGLang server is left: server .* ended with status 3"):
        supervisor.wait_for_loss()
    supervisor.stop()


def test_where_all_servers_are_needed_the_loss_of_one_is_a_loss(ended: ServerProcess, tmp_path: Path) -> None:
    well = ServerProcess("well", "http://127.0.0.1:9", tmp_path / "well.log", grace_s=0.1)
    well.start([sys.executable, "-c", "import time; time.sleep(600)"], {}, "key")
    servers = [Supervised(one, lambda: None, lambda: True, restarts=0, deadline_s=60.0) for one in (ended, well)]
    supervisor = Supervisor(servers, needs_all=True)
    with pytest.raises(ServerDiedError, match=r"^server .* ended with status 3"):
        supervisor.wait_for_loss()
    supervisor.stop()
    well.stop()
    well.join()


def test_a_server_that_is_left_alone_is_not_started_again(tmp_path: Path) -> None:
    process = ServerProcess("server", "http://127.0.0.1:9", tmp_path / "server.log", grace_s=0.1)
    process.start([sys.executable, "-c", "import time; time.sleep(600)"], {}, "key")
    starts: list[int] = []
    supervisor = Supervisor([Supervised(process, lambda: starts.append(1), lambda: True, restarts=3, deadline_s=60.0)])
    supervisor.stop()
    process.stop()
    process.join()
    supervisor.check()
    assert process.ending() is not None
    assert starts == []
