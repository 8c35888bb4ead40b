"""The table of causes, and how errors are sorted into it."""

import datetime
import errno
import os

import pytest
import torch.distributed as dist

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


class SafetensorError(Exception):
    """An error with the name of safetensors'."""


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
    (RuntimeError("CUDA error: device-side assert triggered"), Cause.BUG),
    (TimeoutError("a deadline of ours"), Cause.BUG),
    *((OSError(number, "x"), Cause.NODE_FAULT) for number in (errno.EIO, errno.EREMOTEIO, errno.ESTALE)),
    *((OSError(number, "x"), Cause.NODE_FAULT) for number in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETDOWN)),
    *((OSError(number, "x"), Cause.NODE_FAULT) for number in (errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)),
    (ValueError("a library's"), Cause.BUG),
]


_NCCL = "NCCL error in: ProcessGroupNCCL.cpp:2363, unhandled system error, NCCL version 2.27.3\n"
_OF_SYSTEM = (
    f"{_NCCL}ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
)
_OF_CUDA = f"{_NCCL}ncclUnhandledCudaError: Call to CUDA function failed.\n"
MESSAGES = {
    Cause.OUT_OF_MEMORY: [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        f"{_OF_CUDA}Last error:\nCuda failure 2 'out of memory'",
    ],
    Cause.NODE_FAULT: [
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: no CUDA-capable device is detected",
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "NVRM: Xid (PCI:0000:9b:00): 79, GPU has fallen off the bus.",
        f"{_OF_CUDA}Last error:\nCuda failure 214 'uncorrectable ECC error encountered'",
        "[enforce fail at inline_container.cc:858] . Stale file handle",
    ],
    Cause.RANK_LOST: [
        f"{_OF_SYSTEM}Last error:\nsocketPollConnect: connect to 10.0.0.2<41999> failed : Connection timed out",
        f"{_OF_SYSTEM}Last error:\nCall to ibv_modify_qp failed with error Connection timed out",
        "NCCL communicator was aborted on rank 3. ",
        "The client socket has timed out after 1000ms while trying to connect to (127.0.0.1, 1).",
        "The client socket has failed to connect to any network address of (node1, 10000).",
        "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
    Cause.RANK_HUNG: [
        "wait timeout after 1000ms, keys: /never",
        "Wait timeout",
        "Socket Timeout",
        "Timed out after 301 seconds waiting for clients. 1/2 clients joined.",
        "waitForInput: socket SocketImpl(fd=9) timed out after 600000ms",
        "[gloo/transport/tcp/pair.cc:271] Connect timeout [10.0.0.2]:29437",
        "[gloo/transport/tcp/unbound_buffer.cc:84] Application timeout caused pair closure",
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
    ],
}


@pytest.mark.parametrize(("cause", "text"), [(cause, text) for cause in MESSAGES for text in MESSAGES[cause]])
def test_an_error_of_a_library_is_sorted_by_its_text(cause, text):
    assert cause_of(RuntimeError(text)) is cause
    assert cause_of(KeyError(text)) is Cause.BUG


def test_the_store_of_torch_says_what_the_table_expects():
    """A peer that never comes, and a host that does not listen."""
    second = datetime.timedelta(seconds=1)
    store = dist.TCPStore("127.0.0.1", 0, None, True, timeout=second, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, None, False, timeout=second)
    assert cause_of(raised(lambda: client.get("never"))) is Cause.RANK_HUNG
    assert cause_of(raised(lambda: dist.TCPStore("127.0.0.1", 1, None, False, timeout=second))) is Cause.RANK_LOST


@pytest.mark.parametrize(("code", "cause"), [(5, Cause.NODE_FAULT), (28, Cause.DISK_FULL)])
def test_an_error_of_safetensors_is_sorted_by_the_error_of_its_file(code, cause):
    text = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
    assert cause_of(SafetensorError(text)) is cause


@pytest.mark.parametrize(("error", "cause"), ERRORS, ids=lambda value: repr(value)[:60])
def test_an_error_is_sorted_by_what_it_is(error, cause):
    assert cause_of(raised(lambda: throw(error))) is cause


def test_a_value_error_is_the_users_where_this_package_raised_it():
    assert cause_of(raised(lambda: require(False, "a=1", "must be 2"))) is Cause.BAD_INPUT
    assert cause_of(raised(lambda: int("x"))) is Cause.BUG
