"""The links between one trainer rank and one server rank."""

from __future__ import annotations

import torch.distributed as dist

from megatron_dypo.refit.transports.links import ServerLinks

SOURCE, SERVER_RANK = 3, 0
"""Numbers of the two ranks."""


def links_of(store: dist.Store, *, peers: tuple[int, ...], slot_bytes: int = 64) -> ServerLinks:
    """Describe the links as the end with these ``peers`` does."""
    return ServerLinks(
        store=store,
        store_host="127.0.0.1",
        server=0,
        sources=(SOURCE,),
        num_server_ranks=1,
        peers=peers,
        most_of_a_rank=1,
        slot_bytes=slot_bytes,
    )
