"""Proxies of the environment. Processes of a run must reach each other without one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_LOCAL = ("127.0.0.1", "localhost", "::1")
_NAMES = ("no_proxy", "NO_PROXY")


def direct_hosts(env: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """Return values of ``no_proxy`` and ``NO_PROXY`` with which no proxy is used for ``hosts`` and this host.

    They contain the names that either variable had, followed by the hosts. Libraries read one of the two, usually the
    lower case first. ``*`` is kept as it is, since it is valid only alone.
    """
    given = [part.strip() for name in _NAMES for part in env.get(name, "").split(",") if part.strip()]
    names = ["*"] if "*" in given else dict.fromkeys([*given, *hosts, *_LOCAL])
    return dict.fromkeys(_NAMES, ",".join(names))
