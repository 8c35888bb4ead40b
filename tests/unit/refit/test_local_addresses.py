"""The addresses at which both ends of shared memory meet, and who may open them."""

import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.local import LocalReceiver, LocalSender
from megatron_dypo.refit.transports.rings import make_ring
from tests.support.refit_links import SERVER_RANK, SOURCE, links_of

SOCKET = f"socket/0/{SOURCE}"
"""Key of the store under which a trainer rank names its socket."""
NOBODY = 65534


def test_a_source_and_a_server_rank_meet_below_a_temporary_folder_of_a_long_name(tmp_path, monkeypatch):
    # A Unix socket's address has 107 bytes at most.
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(LocalSender.connect, links_of(store, peers=(0,)), 3, Deadline(20))
        receiver = LocalReceiver.connect(links_of(store, peers=(3,)), 0, Deadline(20))
        sender = coming.result()
    incoming, outgoing = receiver.incoming(3, Deadline(20)), sender.outgoing(0, Deadline(20))
    incoming.expect(8, None)
    outgoing.post(torch.arange(8, dtype=torch.uint8))
    assert incoming.take().tolist() == list(range(8))
    incoming.release()
    outgoing.drain()
    receiver.close()
    sender.close()
    assert list(long.iterdir()) == []


def stranger_reads(path: Path, command: str) -> bool:
    """Return whether another user of this host gets at ``path`` by a command."""
    done = subprocess.run(
        [command, str(path)], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, timeout=60, check=False
    )
    return done.returncode == 0


def test_only_this_user_gets_at_a_waiting_socket_under_any_umask_and_each_has_a_name_of_its_own():
    os.umask(0)
    folders = []
    for _ in range(2):
        store = dist.HashStore()
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(LocalSender.connect, links_of(store, peers=(SERVER_RANK,)), SOURCE, Deadline(20))
            folder = Path(store.get(SOCKET).decode()).parent
            facts = folder.stat()
            assert (stat.S_IMODE(facts.st_mode), facts.st_uid) == (0o700, os.getuid())
            assert [stat.S_ISSOCK(path.stat().st_mode) for path in folder.iterdir()] == [True]
            if os.getuid() == 0:
                assert stranger_reads(folder.parent, "ls")
                assert not stranger_reads(folder, "ls")
            folders.append(folder.name.removeprefix("megatron-dypo-"))
            LocalReceiver.connect(links_of(store, peers=(SOURCE,)), SERVER_RANK, Deadline(20)).close()
            coming.result().close()
        assert not folder.exists()
    assert folders[0] != folders[1]
    assert min(map(len, folders)) >= 8


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_shared_memory_has_no_name_and_nobody_else_can_open_it():
    os.umask(0)
    ring = make_ring(2, 64)
    assert ring.fd is not None
    facts = os.fstat(ring.fd)
    assert (facts.st_nlink, stat.S_IMODE(facts.st_mode), facts.st_uid) == (0, 0o600, os.getuid())
    assert str(Path(f"/proc/self/fd/{ring.fd}").readlink()).startswith("/memfd:"), "not in /dev/shm"
    if os.getuid() == 0:
        assert not stranger_reads(Path(f"/proc/{os.getpid()}/fd/{ring.fd}"), "cat")
    ring.close()
