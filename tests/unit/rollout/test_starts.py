"""Many requests begin a few at a time, in their order, and the event loop does other things in between."""

from __future__ import annotations

import asyncio
import gc

from megatron_dypo.processes.garbage import only_short_collections
from megatron_dypo.rollout.starts import Starts


def test_requests_begin_in_their_order_with_turns_of_the_loop_in_between() -> None:
    async def run() -> list[str]:
        starts, seen = Starts(), list[str]()

        async def one(number: int) -> None:
            await starts.turn()
            seen.append(f"{number}")

        async def other() -> None:
            while len(seen) < 50:
                seen.append("other")
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one(number)) for number in range(30)]
        await asyncio.gather(*tasks, asyncio.create_task(other()))
        return seen

    seen = asyncio.run(run())
    assert [one for one in seen if one != "other"] == [str(number) for number in range(30)]
    longest = max(map(len, " ".join(one if one == "other" else "x" for one in seen).replace(" ", "").split("other")))
    assert longest <= 4


def test_a_request_that_is_cancelled_takes_no_turn() -> None:
    async def run() -> list[int]:
        starts, seen = Starts(), list[int]()

        async def one(number: int) -> None:
            await starts.turn()
            seen.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(12)]
        await asyncio.sleep(0)
        for task in tasks[:10]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        await asyncio.wait_for(one(12), 10)  # the next ones begin too
        return seen

    assert asyncio.run(run()) == [10, 11, 12]


def test_full_collections_wait_for_the_end_of_the_block() -> None:
    before = gc.get_threshold()
    with only_short_collections():
        assert gc.get_threshold() == (*before[:2], 2**31 - 1)
    assert gc.get_threshold() == before
