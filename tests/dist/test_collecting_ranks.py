"""Collections of two replicas: both ranks act on what one leader finds out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.dist.spawn import run_ranks


def rank_collect(folder: str, rollout: dict[str, Any], case: str) -> dict[str, Any]:
    """Collect on this rank of two; return how it ended, and the accounts of both."""
    import torch.distributed as dist

    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.ending import RunEnded
    from megatron_dypo.loop.books.ledger import Ledger
    from megatron_dypo.loop.ranks import MeshRanks
    from megatron_dypo.loop.resume import drawn_state
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from megatron_dypo.rollout.server.process import ServerDiedError
    from tests.support.fake_sglang import FakeSGLang
    from tests.support.loop_cases import collect_groups, leader_of, make_config, make_run, mixed, right

    layout = start_megatron(ParallelConfig())
    rank = dist.get_rank()

    def gone() -> None:
        raise ServerDiedError("SGLang server 0 ended with status 137")

    # Replica 1 is slow: replica 0's groups fill its queues.
    plan = {"slow": lambda index, body: "hang" if rank else "ok"}.get(case, lambda index, body: "ok")
    with FakeSGLang(plan) as fake:
        config = make_config(folder, rollout=rollout)
        judge = right if case == "easy" else mixed
        check = gone if case == "gone" and rank == 1 else None
        ranks = MeshRanks(layout=layout)
        run = make_run([fake.url], config, judge=judge, ranks=ranks, check=check)
        ended = None
        try:
            collect_groups(run)
        except RunEnded as end:
            ended = (end.cause.label, str(end))
        found = run.accounts.balance(run.progress.batch)
        drawn = drawn_state(leader_of(run), run.servers.stream, ranks)
        run.servers.stream.stop()
        after = run.accounts.balance(run.progress.batch)
    close(layout)
    stored = Ledger.from_json(drawn["ledger"])
    open_draws = len(drawn["unfinished"]) + found.open.waiting
    ends = sum(stored.trained.values()) + sum(stored.dropped.values())
    return {
        "ended": ended,
        "differences": (found.difference, after.difference),
        "waiting": found.open.waiting,
        "stored": (stored.drawn, ends + open_draws, drawn["cursor"]),
    }


@pytest.mark.parametrize("rollout", [{}, {"mode": "async"}], ids=["sync", "async"])
@pytest.mark.parametrize("case", ["fine", "easy", "gone", "slow"])
def test_two_replicas_end_alike_and_their_books_balance(tmp_path: Path, rollout: dict[str, Any], case: str) -> None:
    if case == "slow" and not rollout:
        pytest.skip("a synchronous collection waits for all of its groups")
    results = run_ranks(2, rank_collect, str(tmp_path), rollout, case)
    expected = {"easy": "nothing_left", "gone": "servers_gone"}.get(case)
    for result in results:
        assert (result["ended"] or (None,))[0] == expected, result["ended"]
        assert result["differences"] == (0, 0)
        assert result["waiting"] == results[0]["waiting"]
        drawn, accounted, cursor = result["stored"]
        assert drawn == accounted == cursor, "a checkpoint accounts for each position below its cursor"
    if expected is None:
        assert results[0]["waiting"] >= 4
    assert results[0]["ended"] == results[1]["ended"]
