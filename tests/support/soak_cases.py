"""Records of a run and samples of its processes that break no law of a soak, to be changed by tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.soak_parts.invariants import GAP, STALENESS, VERSION
from tools.soak_parts.resources import Sample

EVERY_S = 2.0


def record(step: int, *, without: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """Return the record of a step that drew 8 prompts, 5 of which wait for the next one from the first step on."""
    books = {"ledger/drawn": 8.0 * step + 5, "ledger/trained_rl": 6.0 * step, "ledger/dropped_easy": 2.0 * step}
    waiting = {"ledger/waiting": 5.0, "queue/distill": 1.0, "queue/reinforce": 4.0, "queue/mix": 0.0}
    versions = {VERSION: step - 1.0, STALENESS: 0.5, "rollout/num_rollouts": 64.0}
    update = {"train/num_sequences": 48.0, "gate/offline_share_sequences": 0.1, GAP: 1e-5, "ledger/in_flight": 0.0}
    whole = {"step": step, **books, **waiting, **versions, **update, "queue/stale": 0.0, **changes}
    return {name: value for name, value in whole.items() if name not in without}


GOOD: list[dict[str, Any]] = [{"step": 0}, *(record(step) for step in range(1, 6))]


def last_changed(**changes: Any) -> list[dict[str, Any]]:
    """Return good records, the last of which is changed."""
    return [*GOOD[:-1], record(5, **changes)]


def life(rss: Sequence[int], *, role: str = "rank 0", pid: int = 7, **fields: Sequence[int]) -> list[Sample]:
    """Return the samples of a process, one each two seconds from its first moment on."""
    born, steady = 1000.0, {"descriptors": [10] * len(rss), "threads": [3] * len(rss)}
    rows = zip(rss, *({**steady, **fields}[name] for name in ("descriptors", "threads")), strict=True)
    return [
        Sample(role=role, pid=pid, born=born, time=born + EVERY_S * n, rss=one, descriptors=two, threads=three)
        for n, (one, two, three) in enumerate(rows)
    ]
