"""Collection in the background, from a server that answers when it is told to."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.rollout.stream_sampler import StreamWork
from megatron_dypo.types import DropReason, Prompt, RolloutGroup
from tests.support.fake_sglang import FakeSGLang, wait_until
from tests.support.rollout.clients import make_client, make_prompts


class Draws:
    """The first ``limit`` prompts in order, without those in ``too_long``. It records which were drawn."""

    def __init__(self, limit: int = 1000, too_long: Sequence[int] = ()) -> None:
        self._prompts = make_prompts(limit)
        self._too_long = too_long
        self.orders: list[int] = []
        self.gate = threading.Event()
        """Loading waits for it."""
        self.gate.set()
        self.failure: Exception | None = None

    def claim(self, count: int) -> Sequence[int]:
        drawn = range(len(self.orders), min(len(self.orders) + count, len(self._prompts)))
        self.orders += drawn
        return drawn

    def load(self, orders: Sequence[int]) -> tuple[list[Prompt], DropCounts]:
        assert self.gate.wait(10.0)
        if self.failure is not None:
            raise self.failure
        kept = [self._prompts[order] for order in orders if order not in self._too_long]
        return kept, DropCounts(too_long=tuple(order for order in orders if order in self._too_long))


def order_of(group: RolloutGroup) -> int:
    return group.prompt.order


def make_stream(
    fake: FakeSGLang,
    draws: Draws,
    *,
    finish: Callable[[RolloutGroup], int] = order_of,
    is_useful: Callable[[int], bool] = lambda order: True,
    oversample: float = 1.0,
    check: Callable[[], None] | None = None,
    stop: StopFlag | None = None,
    recall: Callable[[Prompt], Callable[[], int | None] | None] | None = None,
) -> RolloutStream[int]:
    client = make_client([fake.url], check)
    work = StreamWork(claim=draws.claim, load=draws.load, finish=finish, is_useful=is_useful, recall=recall)
    return RolloutStream(client, client.sampling(2), work, oversample=oversample, stop=stop)


@pytest.fixture
def held() -> Iterator[FakeSGLang]:
    """Start a server that answers nothing until it is released."""
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


def test_old_objects_are_not_collected_while_a_stream_runs(held: FakeSGLang) -> None:
    before = gc.get_threshold()
    stream = make_stream(held, Draws())
    for _ in range(2):
        stream.start()
        stream.start()
        assert gc.get_threshold() == (*before[:2], 2**31 - 1)
        stream.stop()
        stream.stop()
        assert gc.get_threshold() == before


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


@pytest.mark.parametrize(("is_recalled", "result"), [(False, 0), (True, 0), (True, None)])
def test_a_group_that_a_worker_has_in_hand_at_a_stop_is_not_made_again(is_recalled: bool, result: int | None) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work() -> int | None:
        begun.set()
        assert may_end.wait(10.0)
        return result

    with FakeSGLang(lambda index, body: "ok" if body["input_ids"][-1] == 100 else "hang") as fake:
        stream = make_stream(
            fake,
            Draws(),
            finish=lambda group: order_of(group) if is_recalled else work() or 0,
            recall=lambda prompt: work if is_recalled and prompt.order == 0 else None,
        )
        stream.want(2)
        stream.start()
        wait_until(lambda: begun.is_set() and fake.open == 1, "one group is in hand, the other is in flight")
        stopping = threading.Thread(target=stream.stop)
        stopping.start()
        wait_until(lambda: fake.cancelled == 1, "all groups are cancelled")
        may_end.set()
        stopping.join(10)
        assert not stopping.is_alive()
    assert stream.take()[0] == ([] if result is None else [0])
    assert stream.unfinished() == ([0, 1] if result is None else [1])
    asked = [body["input_ids"][-1] - 100 for body in fake.requests]
    assert asked == ([1] if is_recalled else [0, 1]), "what could not be recalled is asked for after the stop"


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
        wait_until(lambda: stream.num_in_flight == 0 and stream.num_unread == 2, "two groups are done")
        assert stream.unfinished() == [0, 1]
        stream.take()
        assert stream.unfinished() == []
        stream.stop()


def test_a_dropped_group_is_counted_and_made_up_for() -> None:
    with FakeSGLang(lambda index, body: "500" if body["input_ids"][-1] == 100 else "ok") as fake:
        client = make_client([fake.url], retries=1)
        draws = Draws()
        work = StreamWork(claim=draws.claim, load=draws.load, finish=order_of, is_useful=lambda order: True)
        stream = RolloutStream(client, client.sampling(2), work)
        stream.want(2)
        stream.start()
        wait_until(lambda: stream.num_unread == 3 and stream.num_in_flight == 0, "two groups are done")
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
        wait_until(lambda: stream.is_unserved and stream.num_in_flight == 0, "no server is left")
        assert stream.unfinished() == [0, 1, 2]
        stream.use_servers([other.url], range(3, 5))
        assert not stream.is_unserved
        assert sorted(take_until(stream, 3)) == [0, 1, 2]
        stream.stop()
    assert draw.orders == [0, 1, 2]


def test_slow_tokenising_holds_up_neither_answers_nor_the_trainer(held: FakeSGLang) -> None:
    draws = Draws()
    stream = make_stream(held, draws)
    stream.want(1)
    stream.start()
    wait_until(lambda: held.open == 1, "the first request is open")
    draws.gate.clear()
    stream.want(2)
    wait_until(lambda: draws.orders == [0, 1], "the second prompt is being tokenised")
    assert stream.unfinished() == [0, 1], "a draw counts as unfinished from the moment it is made"
    held.release()
    assert take_until(stream, 1) == [0]
    draws.gate.set()
    stream.want(1)
    assert take_until(stream, 1) == [1]
    stream.stop()


def test_prompts_that_are_tokenised_during_a_stop_are_sampled_first_after_it(held: FakeSGLang) -> None:
    draws = Draws()
    draws.gate.clear()
    stream = make_stream(held, draws)
    stream.want(2)
    stream.start()
    wait_until(lambda: draws.orders == [0, 1], "two prompts are being tokenised")
    stopping = threading.Thread(target=stream.stop)
    stopping.start()
    draws.gate.set()
    stopping.join(10)
    assert not stopping.is_alive()
    assert stream.unfinished() == [0, 1]
    held.release()
    stream.start()
    assert sorted(take_until(stream, 2)) == [0, 1]
    stream.stop()
    assert draws.orders == [0, 1]


def test_prompts_that_are_too_long_are_counted_once_and_made_up_for() -> None:
    with FakeSGLang() as fake:
        stream = make_stream(fake, Draws(too_long=[0, 2]))
        stream.want(2)
        stream.start()
        wait_until(lambda: stream.num_unread >= 4, "two groups are done")
        stream.stop()
    taken, counts = stream.take()
    assert taken == [1, 3]
    assert counts.left_out.too_long == (0, 2)
    assert stream.take()[1].left_out.too_long == ()
    assert stream.unfinished() == []


def test_draws_that_could_not_be_tokenised_stay_unfinished_and_are_tried_again() -> None:
    with FakeSGLang() as fake:
        draws = Draws()
        draws.failure = ValueError("prompt p0: the template raises")
        stream = make_stream(fake, draws)
        stream.want(2)
        stream.start()
        with pytest.raises(ValueError, match="the template raises"):
            stream.wait(10.0)
        stream.stop()
        assert stream.unfinished() == [0, 1]
        draws.failure = None
        stream.start()
        assert sorted(take_until(stream, 2)) == [0, 1]
        stream.stop()
    assert draws.orders == [0, 1]


def test_a_stop_request_ends_a_wait(held: FakeSGLang) -> None:
    stop = StopFlag()
    stream = make_stream(held, Draws(), stop=stop)
    stream.want(2)
    stream.start()
    waiting = threading.Thread(target=stream.wait, args=(60.0,))
    waiting.start()
    wait_until(lambda: held.open == 2, "two requests are open")
    stop.set()
    waiting.join(10)
    assert not waiting.is_alive()
    stream.stop()
    assert stream.unfinished() == [0, 1]
