"""The limit of open files: each request needs a connection, and each connection a file descriptor of this process."""

from __future__ import annotations

import errno
import logging
import os
import resource

_log = logging.getLogger(__name__)


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit of open files to the hard limit; return the resulting limit.

    Call it once at start, before requests are sent. Servers that the run starts inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # an unlimited hard limit may lie above the kernel's own (fs.nr_open)
        _log.warning("the limit of open files stays at %d, the hard limit is %d: %s", soft, hard, error)
        return soft
    return hard


def lacks_descriptors() -> bool:
    """Return whether this process cannot open another file now."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False
