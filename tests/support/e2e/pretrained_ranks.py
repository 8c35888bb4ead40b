"""Trainer ranks with a pretrained model, against a real server."""

from __future__ import annotations

from tests.support.e2e.refitting_ranks import Servers, Trainer, checksums


def rank_refit_in_turn(servers: Servers, models: list[str], axes: dict[str, int]) -> list[dict[str, str]]:
    """Refit the server to each model; return its checksums after each, as rank 0 saw them."""
    trainer = Trainer(servers, **axes)
    refitter = trainer.refitter(bucket_mib=64, deadline_s=300.0)
    seen = []
    for version, model in enumerate(models, start=1):
        trainer.become(model)
        refitter.refit(version)
        if trainer.layout.rank == 0:
            seen.append(checksums(servers, servers.urls[0]))
    refitter.close()
    return seen
