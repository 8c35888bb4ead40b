"""A request to stop after the step under way: SIGUSR1, which Slurm sends ahead of a time limit or a preemption."""

from __future__ import annotations

import signal

PREEMPTED_STATUS = 75
"""Exit status of a run that stopped on request, its checkpoint written: ``EX_TEMPFAIL`` of ``sysexits.h``, try again."""


def hold_requests() -> None:
    """Keep SIGUSR1 pending instead of dying of it; call this before any thread starts.

    Blocked, not handled: Slurm signals every process of a job step, and what a rank starts (verifiers, servers, the
    writer of checkpoints) inherits the mask, while a handler is lost in ``exec``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    # A signal that was set to be ignored (`trap "" USR1` in the shell) need not become pending while it is blocked.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def is_requested() -> bool:
    """Whether this process was sent SIGUSR1 since :func:`hold_requests`."""
    return signal.SIGUSR1 in signal.sigpending()
