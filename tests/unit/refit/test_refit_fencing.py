"""Servers that die, refuse or hang in a refit: one rank, two fake servers, the disk transport."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

import pytest

from megatron_dypo.models.random_model import write_random_model
from megatron_dypo.refit.lockstep import RefitError
from tests.support.fake_control import FakeServer
from tests.support.refit_setting import HF_CONFIG, Setting

REFIT_CALLS = (
    "/pause_generation",
    "/update_weights_from_disk",
    "/update_weight_version",
    "/continue_generation",
)
UPDATE = "/update_weights_from_disk"


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_dypo")


def dies_at(server: FakeServer, path: str) -> Callable[[str], None]:
    def on_call(called: str) -> None:
        if called == path:
            server.die()
            raise ConnectionAbortedError

    return on_call


def refuses(server: FakeServer, path: str = UPDATE) -> None:
    server.answers[path] = (400, {"success": False, "message": "cannot read"})


@pytest.mark.parametrize("path", ["/model_info", *REFIT_CALLS])
def test_wherever_a_server_dies_the_rest_ends_at_the_version(
    setting: Setting, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = setting.servers
    two.on_call = dies_at(two, path)
    report = setting.refitter.refit(7)
    assert (report.fenced, report.rejoined, report.retries) == (1, 0, 1)
    assert setting.refitter.serving == (one.url,)
    assert one.version == "7"
    assert one.posts[-1] == "/continue_generation"
    assert f"server {two.url} is fenced" in caplog.text


def test_thirty_random_deaths_leave_no_serving_server_behind_and_each_server_rejoins(setting: Setting) -> None:
    draw = random.Random(4)
    setting.lost.may_return = True
    for version in range(1, 31):
        victim = draw.choice(setting.servers)
        victim.on_call = dies_at(victim, draw.choice(REFIT_CALLS))
        setting.refitter.refit(version)
        assert setting.refitter.serving == tuple(s.url for s in setting.servers if s is not victim)
        assert all(s.version == str(version) for s in setting.servers if s is not victim)
        victim.come_back()
        report = setting.refitter.refit(version)
        assert (report.fenced, report.rejoined, report.retries) == (0, 1, 0)
        assert [s.version for s in setting.servers] == [str(version)] * 2


def test_a_server_that_was_dead_before_the_refit_is_fenced_in_it(setting: Setting) -> None:
    setting.refitter.refit(1)
    setting.servers[0].die()
    report = setting.refitter.refit(2)
    assert (report.fenced, report.retries) == (1, 1)
    assert setting.refitter.serving == (setting.servers[1].url,)


def test_a_server_that_refuses_is_fenced_and_its_requests_are_aborted(setting: Setting) -> None:
    one, two = setting.servers
    refuses(two)
    setting.refitter.refit(3)
    assert setting.refitter.serving == (one.url,)
    assert two.calls[-1] == ("/pause_generation", {"mode": "abort"})


def test_a_server_that_keeps_its_old_version_is_fenced(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    one, two = setting.servers
    one.answers["/update_weight_version"] = (200, {"success": True})
    setting.refitter.refit(2)
    assert setting.refitter.serving == (two.url,)
    assert f"{one.url}: weight_version='default' after the refit of version 2" in caplog.text


def test_the_rest_stays_paused_between_two_attempts(setting: Setting) -> None:
    one, two = setting.servers
    two.on_call = dies_at(two, UPDATE)
    setting.refitter.refit(3)
    assert one.posts.count("/continue_generation") == 1
    assert one.posts.count(UPDATE) == 2
    assert "failed-3" not in [body.get("new_version") for _, body in one.calls]


@pytest.mark.parametrize("setting", [{"deadline_s": 4.0}], indirect=True)
def test_a_server_that_hangs_costs_half_of_the_deadline_and_the_rest_goes_on(setting: Setting) -> None:
    one, two = setting.servers
    release = threading.Event()
    two.on_call = lambda path: release.wait(30)
    start = time.monotonic()
    setting.refitter.refit(3)
    assert time.monotonic() - start >= 2
    assert setting.refitter.serving == (one.url,)
    release.set()


def test_a_server_that_woke_up_rests_before_it_rejoins(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    one, two = setting.servers
    refuses(two)
    setting.refitter.refit(3)
    two.answers.clear()
    two.calls.clear()
    report = setting.refitter.refit(4)
    assert (report.fenced, report.rejoined, report.retries) == (0, 1, 0)
    assert setting.refitter.serving == (one.url, two.url)
    assert two.version == "4"
    assert two.posts[:4] == ["/continue_generation", "/health", "/pause_generation", "/flush_cache"]
    assert two.calls[3] == ("/pause_generation", {"mode": "abort"})
    assert two.posts.index(UPDATE) > 3
    assert f"server {two.url} answers again and rejoins by the refit of version 4" in caplog.text


@pytest.mark.parametrize("setting", [{"deadline_s": 3600.0}], indirect=True)
def test_a_server_that_hangs_on_stays_fenced_and_nobody_waits_for_half_of_the_deadline(setting: Setting) -> None:
    one, two = setting.servers
    refuses(two)
    setting.refitter.refit(3)
    release = threading.Event()
    two.on_call = lambda path: release.wait(30)
    setting.refitter.refit(4)
    assert setting.refitter.serving == (one.url,)
    release.set()


def test_a_server_of_another_model_does_not_rejoin(setting: Setting) -> None:
    one, two = setting.servers
    refuses(two)
    setting.refitter.refit(3)
    two.answers.clear()
    two.model_path = str(setting.reference.parent / "other")
    write_random_model(setting.reference.parent / "other", {**HF_CONFIG, "intermediate_size": 32}, seed=0)
    setting.refitter.refit(4)
    assert setting.refitter.serving == (one.url,)
    assert UPDATE not in two.posts[-4:]


def test_a_server_that_died_and_runs_again_between_two_refits_rejoins_at_once(setting: Setting) -> None:
    one, two = setting.servers
    setting.refitter.refit(1)
    two.die()
    two.come_back()
    setting.lost.deaths[two.url] = "ended with status 137"
    report = setting.refitter.refit(2)
    assert (report.fenced, report.rejoined, report.retries) == (1, 1, 0)
    assert (one.version, two.version) == ("2", "2")


def test_without_any_server_a_refit_waits_for_one_that_may_return(setting: Setting) -> None:
    one, two = setting.servers
    setting.lost.may_return = True
    setting.refitter.refit(1)
    two.die()
    one.on_call = dies_at(one, UPDATE)
    timer = threading.Timer(1.0, one.come_back)
    timer.start()
    report = setting.refitter.refit(2)
    timer.join()
    assert (report.fenced, report.rejoined) == (2, 1)
    assert setting.refitter.serving == (one.url,)
    assert one.version == "2"


@pytest.mark.parametrize("setting", [{"deadline_s": 3600.0}], indirect=True)
@pytest.mark.parametrize("is_connected", [True, False])
def test_a_run_that_was_asked_to_stop_waits_for_no_server(setting: Setting, is_connected: bool) -> None:
    setting.lost.may_return = True
    if is_connected:
        setting.refitter.refit(1)
    for server in setting.servers:
        server.die()
    timer = threading.Timer(1.0, setattr, (setting.lost, "is_stopping", True))
    timer.start()
    report = setting.refitter.refit(2)
    timer.join()
    assert (report.bytes, report.fenced, setting.refitter.serving) == (0, 2, ())


@pytest.mark.parametrize("setting", [{"deadline_s": 3600.0}], indirect=True)
def test_without_any_server_and_none_to_come_a_refit_does_not_wait_for_its_deadline(setting: Setting) -> None:
    for server in setting.servers:
        server.die()
    with pytest.raises(RefitError, match=r"no server is left to refit: .*no answer"):
        setting.refitter.refit(1)


@pytest.mark.parametrize("setting", [{"deadline_s": 1.5}], indirect=True)
def test_a_server_that_never_returns_fails_the_refit_at_its_deadline(setting: Setting) -> None:
    setting.lost.may_return = True
    for server in setting.servers:
        server.die()
    with pytest.raises(RefitError, match=r"the time limit of 1\.5 s has passed"):
        setting.refitter.refit(1)


def test_a_refit_without_a_server_can_be_followed_by_one_with(setting: Setting) -> None:
    one, _ = setting.servers
    for server in setting.servers:
        server.die()
    with pytest.raises(RefitError):
        setting.refitter.refit(1)
    one.come_back()
    setting.refitter.refit(2)
    assert one.version == "2"


def test_an_error_of_the_trainer_fences_nobody(setting: Setting) -> None:
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    whole, setting.params[name] = setting.params[name], setting.params[name][:-1]
    with pytest.raises(RefitError):
        setting.refitter.refit(1)
    setting.params[name] = whole
    assert setting.refitter.refit(1).rejoined == 0
    assert len(setting.refitter.serving) == 2


def test_refitting_a_version_again_changes_nothing(setting: Setting) -> None:
    setting.refitter.refit(1)
    before = setting.weights_on_disk(1)
    setting.refitter.refit(1)
    after = setting.weights_on_disk(1)
    assert all(before[name].equal(after[name]) for name in before)
    assert [server.version for server in setting.servers] == ["1", "1"]


def test_the_pause_lasts_from_the_first_pause_to_the_end(setting: Setting) -> None:
    slow = threading.Event()
    setting.servers[1].on_call = lambda path: path == UPDATE and slow.wait(0.3)
    report = setting.refitter.refit(1)
    assert 0.3 <= report.pause_seconds <= report.seconds
