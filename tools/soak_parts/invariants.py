"""Laws that the records of a run must obey, whatever happened to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.soak_parts.allowed import Allowed

Record = Mapping[str, Any]
Records = Sequence[Record]
GAP = "train/train_rollout_logprob_abs_diff"
SERVERS_GAP = "old_logp/server_error/mean"
VERSION, STALENESS = "rollout/policy_version", "train/staleness"
QUEUES = ("queue/distill", "queue/reinforce", "queue/mix")
_DRAWN, _WAITING, _IN_FLIGHT = "ledger/drawn", "ledger/waiting", "ledger/in_flight"
_EVERY_UPDATE_HAS = (_DRAWN, _WAITING, _IN_FLIGHT, *QUEUES, STALENESS)


def violations(records: Records, allowed: Allowed) -> list[str]:
    """Return one line for each law that the records break; [] if they obey all."""
    return [
        *_steps(records),
        *_missing(records, allowed),
        *_books(records),
        *_versions(records, allowed),
        *_queues(records, allowed),
        *_logprobs(records, allowed),
    ]


def _steps(records: Records) -> Iterator[str]:
    steps = [record["step"] for record in records]
    if steps and steps[0] > 1:
        yield f"metrics: step {steps[0]} is the first"
    for before, after in itertools.pairwise(steps):
        if after != before + 1:
            yield f"metrics: step {after} follows step {before}"


def _has_update(record: Record) -> bool:
    """Tell whether a record is of a step that made its update. Others are of an evaluation or a collection alone."""
    return "train/num_sequences" in record


def _learns_from_rollouts(record: Record) -> bool:
    return _has_update(record) and record.get("gate/offline_share_sequences", 0.0) < 1.0


def _missing(records: Records, allowed: Allowed) -> Iterator[str]:
    for record in records:
        needed: tuple[str, ...] = _EVERY_UPDATE_HAS if _has_update(record) else ()
        needed += (GAP,) if allowed.trainer_measures and _learns_from_rollouts(record) else ()
        needed += (VERSION,) if record.get("rollout/num_rollouts") else ()
        for name in needed:
            if record.get(name) is None:
                yield f"step {record['step']}: {name} is missing, or not finite"
    learns = any(map(_learns_from_rollouts, records))
    if allowed.servers_are_checked and learns and not any(SERVERS_GAP in record for record in records):
        yield f"{SERVERS_GAP} is in no record"


def _books(records: Records) -> Iterator[str]:
    last = 0.0
    for record in records:
        accounts = {name: value or 0.0 for name, value in record.items() if name.startswith("ledger/")}
        if _DRAWN not in accounts:
            continue
        drawn = accounts.pop(_DRAWN)
        if drawn != sum(accounts.values()):
            yield f"step {record['step']}: {drawn:g} draws, and {sum(accounts.values()):g} in the accounts"
        if drawn < last:
            yield f"step {record['step']}: {drawn:g} draws after {last:g}"
        last = drawn


def _versions(records: Records, allowed: Allowed) -> Iterator[str]:
    """Yield the rollouts that are newer than their step, or older than the mode allows.

    Rounds allow one version for each step, so there it never goes back. From a stream the mean over the rollouts of a
    step may go back, if slow ones come in; its bounds rise with the steps.
    """
    for record in records:
        newest, version, staleness = record["step"] - 1, record.get(VERSION), record.get(STALENESS)
        # Groups that were dropped for their age, or have no verdict, count too, and may be of any age.
        has_any_age = record.get("queue/stale") or record.get("rollout/groups_without_verdict")
        oldest = newest if allowed.in_rounds else 0 if has_any_age else newest - allowed.max_lag
        if version is not None and not oldest <= version <= newest:
            yield f"step {record['step']}: {VERSION}={version:g}, not from {oldest} to {newest}"
        if staleness is not None and not 0 <= staleness <= allowed.max_staleness:
            yield f"step {record['step']}: {STALENESS}={staleness:g}, not from 0 to {allowed.max_staleness:g}"


def _queues(records: Records, allowed: Allowed) -> Iterator[str]:
    for record in records:
        for name, value in record.items():
            if name.startswith(("queue/", "ledger/")) and value is not None and value < 0:
                yield f"step {record['step']}: {name}={value:g}, below 0"
        if not _has_update(record):
            continue
        waiting = sum(record.get(name) or 0.0 for name in QUEUES)
        found = {
            "prompts in the queues": (waiting, allowed.max_waiting),
            "prompts in flight": (record.get(_IN_FLIGHT) or 0.0, allowed.max_waiting),
            "traces in the buffer": (record.get("queue/buffer") or 0.0, allowed.max_buffered),
        }
        for name, (value, most) in found.items():
            if value > most:
                yield f"step {record['step']}: {value:g} {name}, more than {most}"
        more, most = (record.get(_WAITING) or 0.0) - waiting, allowed.max_open
        if not 0 <= more <= most:
            yield f"step {record['step']}: {_WAITING} is {more:g} above the queues, not from 0 to {most}"


def _logprobs(records: Records, allowed: Allowed) -> Iterator[str]:
    for record in records:
        for name in (GAP, SERVERS_GAP):
            gap = record.get(name, 0.0)
            if gap is None or gap > allowed.max_gap:
                yield f"step {record['step']}: {name}={gap}, more than {allowed.max_gap:g}"
