"""Steps that all ranks take together: an error on one rank is raised on all ranks at once."""

import os
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dypo.ending import Cause, cause_of
from tests.support.dist.spawn import RankError, join_world, run_ranks

DEADLINE_S = 3600.0
"""Deadline of the steps. It is longer than any test may take: nobody can have waited for it."""


class OddError(Exception):
    """An error of an unexpected kind."""


def fail(kind):
    from megatron_dypo.refit.answers import ServerError

    if kind == "assert":
        assert [1] == [2], "one is not two"
    if kind == "attribute":
        nothing: Any = None
        nothing.missing  # noqa: B018
    if kind == "server":
        raise ServerError("http://h:1: no answer", "http://h:1")
    raise {
        "key": KeyError("layers.7"),
        "odd": OddError(),
        "value": ValueError("refit.bucket_mib=0: must be positive"),
        "memory": MemoryError(),
        "disk": OSError(28, "No space left on device"),
        "stop": StopIteration(),
        "interrupt": KeyboardInterrupt(),
        "exit": SystemExit(3),
    }[kind]


def step_ranks(kinds):
    """Return for each kind of error what this rank raised, and its cause. Rank 1 fails, in the last step both do."""
    from megatron_dypo.refit.lockstep import Lockstep

    join_world()
    lockstep, rank = Lockstep(DEADLINE_S), dist.get_rank()
    seen: list[Any] = []
    for index, kind in enumerate(kinds):
        try:
            fails = rank == 1 or index == len(kinds) - 1
            lockstep.run((lambda kind=kind: fail(kind)) if fails else None)
        except BaseException as error:  # noqa: BLE001 (any kind is returned)
            seen.append((type(error).__name__, str(error), cause_of(error), getattr(error, "lost", ())))
        else:
            seen.append(None)
        assert lockstep.total(1) == dist.get_world_size()
    assert lockstep.run(lambda: "done") == "done"
    dist.destroy_process_group()
    return seen


ON_ALL = {
    "key": ("KeyError: 'layers.7'", Cause.BUG),
    "assert": ("AssertionError: one is not two", Cause.BUG),
    "attribute": ("AttributeError: 'NoneType' object has no attribute 'missing'", Cause.BUG),
    "odd": ("OddError: ", Cause.BUG),
    "stop": ("StopIteration: ", Cause.BUG),
    "value": ("refit.bucket_mib=0: must be positive", None),
    "memory": ("MemoryError: ", Cause.OUT_OF_MEMORY),
    "disk": ("[Errno 28] No space left on device", Cause.DISK_FULL),
    "server": ("http://h:1: no answer", Cause.SERVERS_GONE),
}


@pytest.fixture(scope="module")
def ranks():
    """Return what each rank saw, by kind of error; the last is the failure of both."""
    return run_ranks(2, step_ranks, [*ON_ALL, "interrupt", "exit", "key"])


@pytest.fixture(scope="module")
def one_rank_failed(ranks):
    return [dict(zip([*ON_ALL, "interrupt", "exit"], seen[:-1], strict=True)) for seen in ranks]


@pytest.mark.parametrize("kind", ON_ALL)
def test_whatever_one_rank_raises_is_raised_on_all_with_its_name_and_rank(kind, one_rank_failed):
    words, cause = ON_ALL[kind]
    for seen in one_rank_failed:
        name, message, found, lost = seen[kind]
        assert (name, message) == ("RefitError", f"rank 1: {words}")
        assert found is cause or cause is None
        assert lost == (("http://h:1",) if kind == "server" else ())


@pytest.mark.parametrize(("kind", "name"), [("interrupt", "KeyboardInterrupt"), ("exit", "SystemExit")])
def test_an_interrupt_goes_on_where_it_came_and_is_told_to_the_others(kind, name, one_rank_failed):
    other, interrupted = (seen[kind] for seen in one_rank_failed)
    assert interrupted[0] == name
    assert other[:2] == ("RefitError", f"rank 1: {name}: {'3' if kind == 'exit' else ''}")


def test_failures_of_several_ranks_are_all_named(ranks):
    for *_, (name, message, _, _) in ranks:
        assert (name, message) == ("RefitError", "rank 0: KeyError: 'layers.7'; rank 1: KeyError: 'layers.7'")


def rank_dies(path):
    """Let rank 1 die in its action; return what rank 0 then saw."""
    from megatron_dypo.refit.lockstep import Lockstep

    join_world()
    lockstep = Lockstep(DEADLINE_S)
    if dist.get_rank() == 1:
        lockstep.run(lambda: os._exit(9))
    try:
        lockstep.run(lambda: fail("key"))
    except BaseException as error:  # noqa: BLE001 (any kind is written down)
        path.write_text(f"{type(error).__name__} {error}")


def test_a_rank_that_dies_is_an_error_on_the_others_at_once_beside_their_own(tmp_path):
    with pytest.raises(RankError, match="rank 1\ndied without a word"):
        run_ranks(2, rank_dies, tmp_path / "seen")
    kind, words = (tmp_path / "seen").read_text().split(" ", 1)
    assert kind == "RuntimeError"
    assert words.startswith("KeyError: 'layers.7'; the other ranks did not report: ")


def rank_echoes():
    """Let rank 1's disk be full and rank 0 fail because of it; return the failure as rank 0 sees it."""
    from megatron_dypo.models.gather import PeerFailedError
    from megatron_dypo.refit.lockstep import Lockstep, RefitError

    join_world()
    lockstep, rank = Lockstep(DEADLINE_S), dist.get_rank()

    def echo():
        raise PeerFailedError("another rank failed")

    try:
        lockstep.run(echo if rank == 0 else lambda: fail("disk"))
    except RefitError as error:
        seen = str(error), error.cause
    try:
        lockstep.run(echo)
    except RefitError as error:
        return *seen, str(error)


def test_a_failure_that_only_echoes_another_ranks_is_not_named_beside_it():
    for message, cause, alone in run_ranks(2, rank_echoes):
        assert (message, cause) == ("rank 1: [Errno 28] No space left on device", Cause.DISK_FULL)
        assert alone == "rank 0: another rank failed; rank 1: another rank failed"
