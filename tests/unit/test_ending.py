"""The table of causes, and how errors are sorted into it."""

import errno

import pytest

from megatron_dypo.checks import require
from megatron_dypo.ending import Cause, RunEnded, cause_of, cause_of_status
from tests.golden.render_exit_statuses import DOCUMENT, render


def test_the_document_is_the_table():
    assert DOCUMENT.read_text() == render(), "python -m tests.golden.render_exit_statuses writes it anew; read the diff"


def test_each_cause_has_a_status_of_its_own():
    statuses = [cause.status for cause in Cause]
    assert len(set(statuses)) == len(statuses)
    assert all(0 <= status < 256 and status not in (1, 2) for status in statuses)
    assert [cause_of_status(status) for status in statuses] == list(Cause)


def test_only_what_worked_needs_no_advice():
    assert [cause for cause in Cause if not cause.value.advice] == [Cause.DONE]


class OutOfMemoryError(RuntimeError):
    """An error with the name of torch's."""


class OfServers(RuntimeError):  # noqa: N818
    cause = Cause.SERVERS_GONE


def raised(action):
    with pytest.raises(BaseException) as error:  # noqa: PT011 (any)
        action()
    return error.value


def throw(error):
    raise error


ERRORS = [
    (RunEnded(Cause.NOTHING_LEFT, "x"), Cause.NOTHING_LEFT),
    (OfServers("x"), Cause.SERVERS_GONE),
    (MemoryError(), Cause.OUT_OF_MEMORY),
    (OutOfMemoryError("x"), Cause.OUT_OF_MEMORY),
    (RuntimeError("CUDA error: out of memory"), Cause.OUT_OF_MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), Cause.OUT_OF_MEMORY),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), Cause.OUT_OF_MEMORY),
    (OSError(errno.ENOSPC, "x"), Cause.DISK_FULL),
    (OSError(errno.EDQUOT, "x"), Cause.DISK_FULL),
    (OSError(errno.EFBIG, "x"), Cause.DISK_FULL),
    (OSError(errno.EACCES, "x"), Cause.BUG),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29437"), Cause.RANK_LOST),
    (RuntimeError("recvValue failed: Connection was likely closed. Did the remote server shutdown?"), Cause.RANK_LOST),
    (
        RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"),
        Cause.RANK_HUNG,
    ),
    (KeyError("connection closed by peer"), Cause.BUG),
    (ValueError("a library's"), Cause.BUG),
]


@pytest.mark.parametrize(("error", "cause"), ERRORS, ids=lambda value: repr(value)[:60])
def test_an_error_is_sorted_by_what_it_is(error, cause):
    assert cause_of(raised(lambda: throw(error))) is cause


def test_a_value_error_is_the_users_where_this_package_raised_it():
    assert cause_of(raised(lambda: require(False, "a=1", "must be 2"))) is Cause.BAD_INPUT
    assert cause_of(raised(lambda: int("x"))) is Cause.BUG
