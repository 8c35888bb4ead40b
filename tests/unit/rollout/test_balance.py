"""The choice of a server."""

from __future__ import annotations

import contextlib

import pytest

from megatron_dypo.rollout.balance import LeastLoaded, NoServerError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_least_loaded_server_is_chosen() -> None:
    servers = LeastLoaded(["a", "b", "c"], rest_s=1.0, clock=Clock())
    with contextlib.ExitStack() as open_requests:
        three = [contextlib.ExitStack() for _ in range(3)]
        url_of = [stack.enter_context(servers.server()) for stack in three]
        for stack in three:
            open_requests.enter_context(stack)
        assert sorted(url_of) == ["a", "b", "c"]
        three[1].close()
        assert open_requests.enter_context(servers.server()) == url_of[1]


def test_idle_servers_take_turns() -> None:
    servers = LeastLoaded(["a", "b"], rest_s=1.0, clock=Clock())
    chosen = []
    for _ in range(6):
        with servers.server() as url:
            chosen.append(url)
    assert chosen in (["a", "b"] * 3, ["b", "a"] * 3)


def test_a_failed_server_rests_and_comes_back() -> None:
    clock = Clock()
    servers = LeastLoaded(["a", "b"], rest_s=1.0, clock=clock)
    servers.failed("a")
    with contextlib.ExitStack() as open_requests:
        assert [open_requests.enter_context(servers.server()) for _ in range(3)] == ["b", "b", "b"]
        clock.now = 1.0
        assert open_requests.enter_context(servers.server()) == "a"


def test_when_every_server_rests_the_least_loaded_is_tried() -> None:
    servers = LeastLoaded(["a", "b"], rest_s=1.0, clock=Clock())
    with servers.server() as busy:
        servers.failed("a")
        servers.failed("b")
        with servers.server() as chosen:
            assert {busy, chosen} == {"a", "b"}


def test_a_server_that_is_left_out_is_chosen_no_more() -> None:
    servers = LeastLoaded(["a", "b"], rest_s=1.0, clock=Clock())
    assert servers.leave_out("a")
    assert not servers.leave_out("a"), "it is left out already"
    with contextlib.ExitStack() as open_requests:
        assert [open_requests.enter_context(servers.server()) for _ in range(3)] == ["b", "b", "b"]
    servers.leave_out("b")
    with pytest.raises(NoServerError, match=r"no SGLang server is left: a, b went"), servers.server():
        pass


def test_no_server_is_an_error() -> None:
    with pytest.raises(ValueError, match="name at least one"):
        LeastLoaded([], rest_s=1.0, clock=Clock())
