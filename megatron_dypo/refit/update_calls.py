"""The control calls around an update of weights, in their order; made by the global leader.

``in_session``: SGLang wants the update between ``/begin_weight_update`` and ``/end_weight_update``.
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
"""Time that servers get for calls after a failure."""

Steps = list[tuple[str, Answer | None]]


def begin_update(
    control: SGLangControl, in_flight: Literal["pause", "abort"], in_session: bool, deadline: Deadline
) -> None:
    """Pause all servers; their running requests go back to the queue, or with ``abort`` end."""
    if in_flight == "abort":
        control.pause("abort", deadline)
    # After an abort too: this drains the scheduler, so that no update's flush of the cache can be refused.
    control.pause("retract", deadline)
    if in_session:
        control.begin_update(deadline)


def end_update(control: SGLangControl, version: int, in_session: bool, deadline: Deadline) -> None:
    """Name the new version, check that all servers serve it, and let them generate again."""
    if in_session:
        control.end_update(deadline)
    control.set_version(str(version), deadline)
    for url, served in zip(control.urls, control.weight_versions(deadline), strict=True):
        if served != str(version):
            raise ServerError(f"{url}: weight_version={served!r} after the refit of version {version}", url)
    control.resume(deadline)


def find_culprits(control: SGLangControl, error: RefitError, in_session: bool) -> tuple[str, ...]:
    """Return the URLs of the servers that made an attempt fail; all others stay paused.

    Servers that do not answer now are blamed; if all answer, the ones that the error blames are.
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

    ``is_dirty``: some may hold a mixture of weights. All are then marked by a version that is no number, and their
    requests end.
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
