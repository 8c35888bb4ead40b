"""The control calls before and after an update of weights. The global leader makes them.

``in_session``: whether the transport's updates stand between ``/begin_weight_update`` and ``/end_weight_update``, on
servers that have these calls.
"""

from __future__ import annotations

import logging
from typing import Literal

from megatron_dypo.refit.answers import Answer, ServerError
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.lockstep import RefitError

logger = logging.getLogger(__name__)

RECOVERY_S = 10.0
"""Seconds for the calls to servers after a failure."""

Steps = list[tuple[str, Answer | None]]


def begin_update(
    control: SGLangControl, in_flight: Literal["pause", "abort"], in_session: bool, deadline: Deadline
) -> None:
    """Pause all servers. Their running requests go back to the queue; with ``abort`` they end.

    They end also on servers without weight-update sessions: these would name the last version for all of a response's
    tokens.
    """
    if in_flight == "abort" or control.with_sessions != control.urls:
        control.pause("abort", deadline)
    # Also after an abort: this drains the scheduler, so that it cannot refuse to flush its cache in the update.
    control.pause("retract", deadline)
    if in_session:
        control.begin_update(deadline)


def end_update(control: SGLangControl, version: int, in_session: bool, deadline: Deadline) -> None:
    """Set the new version, check that all servers serve it, and let them generate again."""
    if in_session:
        control.end_update(deadline)
    control.set_version(str(version), deadline)
    for url, served in zip(control.urls, control.weight_versions(deadline), strict=True):
        if served != str(version):
            raise ServerError(f"{url}: weight_version={served!r} after the refit of version {version}", url)
    control.resume(deadline)


def find_culprits(control: SGLangControl, error: RefitError, in_session: bool) -> tuple[str, ...]:
    """Return the URLs of the servers that made an attempt fail. All others stay paused.

    They are the servers that do not answer now; if all answer, they are the servers that the error names.
    """
    steps: Steps = [("/pause_generation", {"mode": "retract"})]
    if in_session:
        steps += [("/end_weight_update", {})]
    silent = [failed for failed in control.attempt(steps, RECOVERY_S) if failed.is_silent]
    if silent:
        return tuple(dict.fromkeys(url for failed in silent for url in failed.urls))
    control.attempt([("/pause_generation", {"mode": "abort"})], RECOVERY_S, error.lost)
    return error.lost


def abort_update(control: SGLangControl, version: int, *, in_session: bool, is_dirty: bool) -> None:
    """Let all servers generate again after a failure.

    ``is_dirty``: some servers may hold a mixture of weights. All servers then get a version that is no number, and
    their requests end.
    """
    steps: Steps = []
    if in_session:
        steps += [("/end_weight_update", {})]
    if is_dirty:
        mark = {"new_version": f"failed-{version}", "abort_all_requests": True}
        steps += [("/update_weight_version", mark), ("/flush_cache", {})]
    steps += [("/continue_generation", {})]
    for error in control.attempt(steps, RECOVERY_S):
        logger.info("after the failed refit of version %d: %s", version, error)
