"""Control calls to several servers over real HTTP: deadlines, refusals, the key."""

import socket
import threading
from concurrent.futures import CancelledError

import pytest

from megatron_dypo.refit.answers import MAX_ANSWER_BYTES, ServerError
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.update_calls import begin_update
from tests.support.fake_control import KEY, fake_servers


@pytest.fixture
def servers():
    with fake_servers(2) as running:
        yield running


@pytest.fixture
def control(servers):
    control = SGLangControl([server.url for server in servers], KEY)
    yield control
    control.close()


def test_describe_keeps_the_order_of_the_servers(servers, control):
    servers[1].tp_size, servers[1].version = 2, "7"
    infos = control.describe(Deadline(5))
    assert [info.url for info in infos] == [server.url for server in servers]
    assert [info.tensor_parallel for info in infos] == [1, 2]
    assert [info.weight_version for info in infos] == ["default", "7"]


def test_every_server_gets_the_call(servers, control):
    control.pause("retract", Deadline(5))
    assert all(server.calls == [("/pause_generation", {"mode": "retract"})] for server in servers)


def test_success_false_is_a_refusal_even_with_status_200(servers, control):
    servers[1].answers["/end_weight_update"] = (200, {"success": False, "message": "no session"})
    with pytest.raises(ServerError, match=f"{servers[1].url}/end_weight_update: status 200: no session"):
        control.end_update(Deadline(5))


def test_a_refusal_in_plain_text_is_quoted(servers, control):
    servers[0].answers["/update_weights_from_disk"] = (500, "Internal Server Error")
    with pytest.raises(ServerError, match="status 500: Internal Server Error"):
        control.update_from_disk("/m", Deadline(5))


def test_all_failing_servers_are_named(servers, control):
    for server in servers:
        server.answers["/continue_generation"] = (400, {"message": "no"})
    with pytest.raises(ServerError) as caught:
        control.resume(Deadline(5))
    assert all(server.url in str(caught.value) for server in servers)


def test_a_wrong_key_is_refused_by_name(servers):
    control = SGLangControl([servers[0].url], "wrong")
    with pytest.raises(ServerError, match="status 401"):
        control.weight_versions(Deadline(5))
    control.close()


def test_a_server_that_is_not_there_is_named_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        control = SGLangControl([url], None)
        with pytest.raises(ServerError, match=f"GET {url}/model_info: no answer"):
            control.weight_versions(Deadline(3600))
        control.close()


def test_a_server_that_hangs_is_named_when_the_deadline_passes(servers, control):
    release = threading.Event()
    servers[1].on_call = lambda path: release.wait(20)
    with pytest.raises(ServerError, match=f"{servers[1].url}/pause_generation: no answer in"):
        control.pause("retract", Deadline(0.5))
    release.set()


def test_after_the_deadline_nothing_is_sent(servers, control):
    with pytest.raises(ServerError, match=r"was not sent .*: the time limit of 0 s has passed"):
        control.resume(Deadline(0))
    assert servers[0].calls == []


def test_one_failure_of_a_collective_call_does_not_wait_for_the_others(servers, control):
    release = threading.Event()
    servers[0].on_call = lambda path: release.wait(600)
    servers[1].answers["/update_weights_from_distributed"] = (400, {"success": False, "message": "no group"})
    with pytest.raises(ServerError, match="no group"):
        control.start_update({"names": []}, Deadline(3600)).result()
    release.set()


def test_a_session_left_open_is_closed_and_opened_again(servers, control):
    def close_session(path):
        if path == "/end_weight_update":
            servers[0].answers.clear()

    servers[0].answers["/begin_weight_update"] = (400, {"success": False, "message": "a session is already open"})
    servers[0].on_call = close_session
    control.begin_update(Deadline(5))
    assert servers[0].posts == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


def test_only_servers_that_have_sessions_are_asked_to_open_one(servers, control):
    servers[0].sglang = "0.5.12"
    control.describe(Deadline(5))
    control.begin_update(Deadline(5))
    control.end_update(Deadline(5))
    assert [server.posts for server in servers] == [[], ["/begin_weight_update", "/end_weight_update"]]
    servers[0].sglang = "0.5.22"  # it was started again, by a newer one
    control.describe(Deadline(5))
    control.begin_update(Deadline(5))
    assert servers[0].posts == ["/begin_weight_update"]


def test_where_no_server_has_sessions_none_is_opened(servers, control):
    for server in servers:
        server.sglang = "0.5.21"
    control.describe(Deadline(5))
    control.begin_update(Deadline(5))
    control.end_update(Deadline(5))
    assert [server.posts for server in servers] == [[], []]


@pytest.mark.parametrize(("sglang", "pauses"), [("0.5.12", ["abort", "retract"]), ("0.5.23", ["retract"])])
def test_a_server_that_names_one_version_for_a_response_ends_its_requests(servers, control, sglang, pauses):
    servers[1].sglang = sglang
    control.describe(Deadline(5))
    begin_update(control, "pause", True, Deadline(5))
    assert [body["mode"] for path, body in servers[1].calls if path == "/pause_generation"] == pauses


def test_attempt_goes_on_after_a_refusal(servers, control):
    servers[0].answers["/a"] = (400, {"message": "no"})
    errors = control.attempt([("/a", {}), ("/b", {})], 5)
    assert [server.posts for server in servers] == [["/a", "/b"]] * 2
    assert len(errors) == 1
    assert errors[0].url == servers[0].url
    assert f"{servers[0].url}/a" in str(errors[0])


def test_no_server_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        SGLangControl([], None)


def test_the_servers_that_refuse_are_to_blame(servers, control):
    servers[1].answers["/continue_generation"] = (400, {"message": "no"})
    with pytest.raises(ServerError) as caught:
        control.resume(Deadline(5))
    assert caught.value.url == servers[1].url
    assert caught.value.urls == (servers[1].url,)
    assert not caught.value.is_silent


def test_nobody_is_blamed_for_a_collective_call_that_runs_out_of_time(servers, control):
    release = threading.Event()
    for server in servers:
        server.on_call = lambda path: release.wait(20)
    with pytest.raises(ServerError, match="no answer in") as caught:
        control.start_update({"names": []}, Deadline(0.5)).result()
    assert caught.value.url is None
    release.set()


@pytest.mark.parametrize("call", [lambda c: c.resume(Deadline(5)), lambda c: c.weight_versions(Deadline(5))])
def test_a_redirect_is_a_refusal_and_takes_the_key_nowhere(servers, control, call):
    for path in ("/continue_generation", "/model_info"):
        servers[0].redirects[path] = f"{servers[1].url}/elsewhere"
    with pytest.raises(ServerError, match=f"{servers[0].url}/.*: status 307") as caught:
        call(control)
    assert caught.value.urls == (servers[0].url,)
    assert "/elsewhere" not in [path for path, _ in servers[1].calls]


def test_an_answer_of_any_length_is_read_to_the_limit_and_no_further(servers, control):
    servers[0].answers["/model_info"] = (200, "x" * (MAX_ANSWER_BYTES + 1))
    with pytest.raises(ServerError, match=f"{servers[0].url}.*more than {MAX_ANSWER_BYTES} bytes"):
        control.weight_versions(Deadline(30))
    servers[0].answers["/model_info"] = (200, {"weight_version": "7", "padding": "x" * 100_000})
    assert control.weight_versions(Deadline(30))[0] == "7"


def test_closing_ends_the_calls_that_are_under_way(servers):
    asked, release = threading.Event(), threading.Event()

    def hang(path):
        asked.set()
        release.wait(20)

    servers[0].on_call = hang
    control = SGLangControl([servers[0].url], KEY)
    answer = control.start_update({"names": []}, Deadline(20))
    assert asked.wait(20)
    control.close()
    with pytest.raises(CancelledError):
        answer.result(timeout=0)
    control.close()
    release.set()


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_takes_no_request_is_asked_again_until_it_does(servers, control, status):
    asked = []

    def recover(path):
        asked.append(path)
        if len(asked) == 3:
            servers[1].answers.clear()

    servers[1].answers["/pause_generation"] = (status, "drained")
    servers[1].on_call = recover
    control.pause("retract", Deadline(60))
    assert len(servers[1].posts) == 3
    assert servers[0].posts == ["/pause_generation"], "a call that was taken is not made again"


def test_a_server_that_takes_no_request_to_the_end_is_named_with_its_answer(servers, control):
    servers[1].answers["/pause_generation"] = (503, "drained")
    with pytest.raises(ServerError, match=f"{servers[1].url}/pause_generation: status 503: drained"):
        control.pause("retract", Deadline(1))


def test_a_server_that_takes_no_request_and_then_hangs_is_named_with_both(servers, control):
    asked, end = [], threading.Event()

    def hang(path):
        asked.append(path)
        if len(asked) > 1:
            end.wait(60)

    servers[1].answers["/pause_generation"] = (503, "drained")
    servers[1].on_call = hang
    with pytest.raises(ServerError, match="/pause_generation: status 503: drained, then no answer in"):
        control.pause("retract", Deadline(4))
    end.set()
