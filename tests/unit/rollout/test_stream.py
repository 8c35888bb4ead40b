"""Collection in the background, from an upstream that answers when it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.types import DropReason, Prompt, RolloutGroup
from tests.support.fake_sglang import FakeSGLang, wait_until
from tests.unit.rollout.test_collect import make_client, make_prompts


class Draws:
    """Prompts in order, for ever; remembers how many were asked for."""

    def __init__(self, limit: int = 1000) -> None:
        self._prompts = iter(make_prompts(limit))
        self.orders: list[int] = []

    def __call__(self, count: int) -> list[Prompt]:
        drawn = [prompt for _, prompt in zip(range(count), self._prompts, strict=False)]
        self.orders += [prompt.order for prompt in drawn]
        return drawn


def order_of(group: RolloutGroup) -> int:
    return group.prompt.order


def make_stream(
    fake: FakeSGLang,
    draw: Callable[[int], Sequence[Prompt]],
    *,
    finish: Callable[[RolloutGroup], int] = order_of,
    is_useful: Callable[[int], bool] = lambda order: True,
    oversample: float = 1.0,
    check: Callable[[], None] | None = None,
) -> RolloutStream[int]:
    client = make_client([fake.url], check)
    return RolloutStream(
        client, client.sampling(2), draw=draw, finish=finish, is_useful=is_useful, oversample=oversample
    )


@pytest.fixture
def held() -> Iterator[FakeSGLang]:
    """A server that answers nothing until it is released."""
    with FakeSGLang(lambda index, body: "hang") as fake:
        yield fake


def take_until(stream: RolloutStream[int], count: int, deadline_s: float = 10.0) -> list[int]:
    taken: list[int] = []
    end = time.monotonic() + deadline_s
    while len(taken) < count:
        assert time.monotonic() < end, f"{len(taken)} of {count} groups"
        stream.wait(0.1)
        taken += stream.take()[0]
    return taken


def test_no_more_is_in_flight_than_is_wanted(held: FakeSGLang) -> None:
    draw = Draws()
    stream = make_stream(held, draw)
    stream.want(5)
    stream.start()
    wait_until(lambda: held.open == 5, "five requests are open")
    held.release()
    assert sorted(take_until(stream, 5)) == [0, 1, 2, 3, 4]
    stream.stop()
    assert draw.orders == [0, 1, 2, 3, 4]


def test_oversampling_keeps_more_in_flight_and_returns_all_that_finish(held: FakeSGLang) -> None:
    draw = Draws()
    stream = make_stream(held, draw, oversample=1.5)
    stream.want(4)
    stream.start()
    wait_until(lambda: held.open == 6, "six requests are open")
    held.release()
    assert sorted(take_until(stream, 6)) == list(range(6))
    stream.stop()


def test_groups_that_are_of_no_use_are_returned_and_made_up_for() -> None:
    with FakeSGLang() as fake:
        draw = Draws()
        stream = make_stream(fake, draw, is_useful=lambda order: order % 2 == 1)
        stream.want(3)
        stream.start()
        taken = take_until(stream, 6)
        stream.stop()
    assert sum(order % 2 for order in taken) == 3
    assert sorted(taken) == draw.orders


def test_a_wait_ends_with_as_many_useful_groups_as_it_asks_for() -> None:
    with FakeSGLang() as fake:
        stream = make_stream(fake, Draws(), is_useful=lambda order: order % 2 == 1)
        stream.want(3)
        stream.start()
        stream.wait(10.0, useful=3)
        done, _ = stream.take()
        begun = time.monotonic()
        stream.wait(0.2)
        waited = time.monotonic() - begun
        stream.stop()
    assert sum(order % 2 for order in done) == 3
    assert waited >= 0.2, "nothing that counts is wanted any more"


def test_what_was_in_flight_at_a_stop_is_drawn_first_at_the_next_start(held: FakeSGLang) -> None:
    draw = Draws()
    stream = make_stream(held, draw)
    stream.want(3)
    stream.start()
    wait_until(lambda: held.open == 3, "three requests are open")
    stream.stop()
    wait_until(lambda: held.cancelled == 3, "all connections are closed")
    assert stream.unfinished() == [0, 1, 2]
    held.release()
    stream.start()
    assert sorted(take_until(stream, 3)) == [0, 1, 2]
    stream.stop()
    assert draw.orders == [0, 1, 2]
    assert stream.unfinished() == []


def test_postponed_prompts_come_before_new_draws(held: FakeSGLang) -> None:
    draw = Draws(limit=3)
    stream = make_stream(held, draw)
    stream.postpone(make_prompts(9)[7:])
    stream.want(4)
    held.release()
    stream.start()
    assert sorted(take_until(stream, 4)) == [0, 1, 7, 8]
    stream.stop()
    assert draw.orders == [0, 1]


def test_unfinished_counts_what_is_done_but_not_taken() -> None:
    with FakeSGLang() as fake:
        stream = make_stream(fake, Draws())
        stream.want(2)
        stream.start()
        wait_until(lambda: not stream._state.in_flight and len(stream._state.done) == 2, "two groups are done")
        assert stream.unfinished() == [0, 1]
        stream.take()
        assert stream.unfinished() == []
        stream.stop()


def test_a_dropped_group_is_counted_and_made_up_for() -> None:
    with FakeSGLang(lambda index, body: "500" if body["input_ids"][-1] == 100 else "ok") as fake:
        client = make_client([fake.url], retries=1)
        stream = RolloutStream(client, client.sampling(2), draw=Draws(), finish=order_of, is_useful=lambda order: True)
        stream.want(2)
        stream.start()
        wait_until(lambda: len(stream._state.done) == 2 and not stream._state.in_flight, "two groups are done")
        stream.stop()
    assert stream.unfinished() == [0, 1, 2], "whoever saves before it takes draws a dropped group again"
    taken, counts = stream.take()
    assert taken == [1, 2]
    assert counts.client.retries == 1
    assert [(group.prompt.order, group.reason) for group in counts.dropped] == [(0, DropReason.INCOMPLETE)]
    assert stream.unfinished() == []


def test_an_error_in_the_background_reaches_the_trainer(held: FakeSGLang) -> None:
    def check() -> None:
        raise ServerDiedError("SGLang server 0 (http://…) ended with status 137")

    stream = make_stream(held, Draws(), check=check)
    stream.want(2)
    stream.start()
    with pytest.raises(ServerDiedError, match="status 137"):
        stream.wait(10.0)
    stream.stop()


def test_an_error_of_the_grader_reaches_the_trainer() -> None:
    def finish(group: RolloutGroup) -> int:
        raise ValueError("grading.verifier='x:y': its import takes too long")

    with FakeSGLang() as fake:
        stream = make_stream(fake, Draws(), finish=finish)
        stream.want(1)
        stream.start()
        with pytest.raises(ValueError, match="its import"):
            stream.wait(10.0)
        stream.stop()


def test_prompts_that_lost_their_servers_are_asked_again_where_serve_says() -> None:
    with FakeSGLang(lambda index, body: "die") as dead, FakeSGLang(version="4") as other:
        draw = Draws()
        stream = make_stream(dead, draw)
        stream.want(3)
        stream.start()
        wait_until(lambda: stream.is_unserved and not stream._state.in_flight, "no server is left")
        assert stream.unfinished() == [0, 1, 2]
        stream.serve([other.url], range(3, 5))
        assert not stream.is_unserved
        assert sorted(take_until(stream, 3)) == [0, 1, 2]
        stream.stop()
    assert draw.orders == [0, 1, 2]
