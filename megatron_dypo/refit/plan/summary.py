"""The cost of a plan for people: bytes of ranks and links, a lower bound of the time, and the predicted time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dypo.checks import require
from megatron_dypo.refit.plan.refit_plan import RefitPlan

_LARGEST = 8
_ROUNDING_BYTES = 1e-3

Link = tuple[int, int, int]
"""Trainer rank, server, server rank."""
ServerRank = tuple[int, int]
"""Server, server rank."""


@dataclass(frozen=True, kw_only=True)
class RefitSummary:
    """Bytes and times of one refit."""

    sent: Mapping[int, int]
    """Trainer rank → bytes; 0 for ranks that send nothing."""
    received: Mapping[ServerRank, int]
    links: Mapping[Link, int]
    bandwidth: float
    """Bytes per second that a rank can send, and that a rank can receive."""
    limit_s: float
    """Bytes of the busiest rank ÷ bandwidth. No order of sending can be faster."""
    predicted_s: float
    """The result of :func:`predict`."""


def summarize(plan: RefitPlan, bandwidth: float) -> RefitSummary:
    """Compute everything that is printed of a plan, at ``bandwidth`` bytes per second for each rank.

    Raises:
        ValueError: the bandwidth is not positive.
    """
    require(bandwidth > 0, f"bandwidth={bandwidth}", "must be positive")
    links = plan.link_bytes()
    sent = Counter(dict.fromkeys(range(plan.source.world_size), 0))
    received: Counter[ServerRank] = Counter()
    for (source, server, server_rank), num_bytes in links.items():
        sent[source] += num_bytes
        received[server, server_rank] += num_bytes
    return RefitSummary(
        sent=sent,
        received=received,
        links=links,
        bandwidth=bandwidth,
        limit_s=max(*sent.values(), *received.values()) / bandwidth,
        predicted_s=predict(_phases(plan, links), bandwidth),
    )


def predict(phases: Mapping[int, Sequence[Mapping[ServerRank, int]]], bandwidth: float) -> float:
    """Return the seconds until everything is sent, in a fluid model.

    A trainer rank sends its phases one after the other (in a plan, a phase is a server), and within a phase to all
    server ranks at once, in proportion to their bytes. Its speed is ``bandwidth`` divided by the overload of its most
    loaded server rank. The overload of a server rank is the sum of the rates at which all trainer ranks would send to
    it at full speed, divided by ``bandwidth``. Bandwidth that stays free at other server ranks is not used. The model
    leaves out latency, staging copies and shared network links beyond the ranks' own.
    """
    queues = {source: list(reversed(own)) for source, own in phases.items() if own}
    shares = {source: _shares(own[-1]) for source, own in queues.items()}
    left = {source: float(sum(own[-1].values())) for source, own in queues.items()}
    now = 0.0
    while left:
        load: defaultdict[ServerRank, float] = defaultdict(float)
        for share in shares.values():
            for server_rank, part in share.items():
                load[server_rank] += part
        speeds = {
            source: bandwidth / max(1.0, max(load[server_rank] for server_rank in share))
            for source, share in shares.items()
        }
        step = min(num_bytes / speeds[source] for source, num_bytes in left.items())
        now += step
        for source in list(left):
            left[source] -= speeds[source] * step
            if left[source] <= _ROUNDING_BYTES:
                queues[source].pop()
                if queues[source]:
                    shares[source], left[source] = _shares(queues[source][-1]), float(sum(queues[source][-1].values()))
                else:
                    del shares[source], left[source]
    return now


def to_text(plan: RefitPlan, summary: RefitSummary) -> str:
    """Format the summary for a terminal."""
    total, busiest_sent = sum(summary.links.values()), max(summary.sent.values())
    senders = sum(num_bytes > 0 for num_bytes in summary.sent.values())
    lines = [
        f"trainer    {plan.source.world_size} ranks, {senders} of them send",
        f"servers    {len(plan.servers)} with {len(summary.received)} ranks in all",
        f"in all     {_size(total)} over {len(summary.links)} links",
        f"sent       mean {_size(total / len(summary.sent))}, largest {_size(busiest_sent)} a rank",
        f"received   mean {_size(total / len(summary.received))}, "
        f"largest {_size(max(summary.received.values()))} a rank",
        f"limit      {summary.limit_s:.3f} s at {summary.bandwidth / 1e9:g} GB/s a rank "
        "(its busiest sends or receives)",
        f"predicted  {summary.predicted_s:.3f} s, {summary.predicted_s / summary.limit_s:.2f} × the limit",
    ]
    groups = {
        "trainer ranks": {f"rank {rank}": num_bytes for rank, num_bytes in summary.sent.items()},
        "server ranks": {f"server {server} rank {at}": size for (server, at), size in summary.received.items()},
        "links": {
            f"rank {source} → server {server} rank {at}": size for (source, server, at), size in summary.links.items()
        },
    }
    for title, sizes in groups.items():
        lines += ["", f"busiest {title}"]
        lines += [
            f"  {_size(sizes[name]):>10}  {name}"
            for name in sorted(sizes, key=sizes.__getitem__, reverse=True)[:_LARGEST]
        ]
    return "\n".join(lines)


def to_json(summary: RefitSummary) -> dict[str, Any]:
    """Return the summary for programs: every rank and every link, in bytes and seconds."""
    return {
        "total_bytes": sum(summary.links.values()),
        "limit_s": summary.limit_s,
        "predicted_s": summary.predicted_s,
        "bandwidth_bytes_per_s": summary.bandwidth,
        "sent": [{"rank": rank, "bytes": size} for rank, size in summary.sent.items()],
        "received": [
            {"server": server, "rank": server_rank, "bytes": size}
            for (server, server_rank), size in summary.received.items()
        ],
        "links": [
            {"rank": source, "server": server, "server_rank": server_rank, "bytes": size}
            for (source, server, server_rank), size in summary.links.items()
        ],
    }


def _phases(plan: RefitPlan, links: Mapping[Link, int]) -> dict[int, list[dict[ServerRank, int]]]:
    """Return, for each rank, the bytes to each server rank, server by server in the order of the plan."""
    by_server: defaultdict[tuple[int, int], dict[ServerRank, int]] = defaultdict(dict)
    for (source, server, server_rank), num_bytes in links.items():
        by_server[source, server][server, server_rank] = num_bytes
    return {
        rank: [by_server[rank, server] for server in plan.servers_of(rank)] for rank in range(plan.source.world_size)
    }


def _shares(phase: Mapping[ServerRank, int]) -> dict[ServerRank, float]:
    total = sum(phase.values())
    return {server_rank: num_bytes / total for server_rank, num_bytes in phase.items()}


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3f} MB"
