"""The addresses at which both ends of shared memory meet."""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.links import ServerLinks
from megatron_dypo.refit.transports.local import LocalReceiver, LocalSender


def test_a_source_and_a_server_rank_meet_below_a_temporary_folder_of_a_long_name(tmp_path, monkeypatch):
    # A Unix socket's address has 107 bytes at most.
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    links = ServerLinks(store=dist.HashStore(), server=0, sources=(3,), num_server_ranks=1, slot_bytes=64)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(LocalSender.connect, links, 3, Deadline(20))
        receiver = LocalReceiver.connect(links, 0, Deadline(20))
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
