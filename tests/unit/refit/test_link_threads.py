"""Links have one thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from megatron_dypo.refit.transports.threads import run_concurrently


def raiser(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(0), KeyboardInterrupt(), GeneratorExit(), MemoryError()])
def test_whatever_an_action_raises_is_returned_in_its_place(error: BaseException) -> None:
    done: list[int] = []
    assert run_concurrently([lambda: done.append(0), raiser(error), lambda: done.append(2)]) == [None, error, None]
    assert sorted(done) == [0, 2]


def test_an_action_whose_thread_does_not_start_has_failed_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    start, count = threading.Thread.start, iter(range(3))

    def limited(thread: threading.Thread) -> None:
        if next(count) == 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    done: list[int] = []
    monkeypatch.setattr(threading.Thread, "start", limited)
    first, second, third = run_concurrently([lambda: done.append(0), lambda: done.append(1), lambda: done.append(2)])
    assert (first, third) == (None, None)
    assert "can't start new thread" in str(second)
    assert sorted(done) == [0, 2]


def test_an_action_that_is_lost_is_not_waited_for_and_the_others_are() -> None:
    never, errors = threading.Event(), [LookupError("lost"), KeyError("x")]
    reasons = {1: errors[0]}
    done: list[int] = []

    def wait() -> None:
        never.wait()

    found = run_concurrently([lambda: done.append(0), wait, raiser(errors[1])], reasons.get)
    assert found == [None, errors[0], errors[1]]
    assert done == [0]
    never.set()
