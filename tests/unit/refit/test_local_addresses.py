"""The addresses at which both ends of shared memory meet."""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.transports.local import LocalReceiver, LocalSender
from tests.support.refit_links import links_of


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
