"""Proxies of the environment, which must not stand between processes of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_LOCAL = ("127.0.0.1", "localhost", "::1")
_NAMES = ("no_proxy", "NO_PROXY")


def direct_hosts(env: Mapping[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """Return ``no_proxy`` and ``NO_PROXY`` with which ``hosts`` and this host are reached without a proxy.

    They name what either named before, and then the hosts. Libraries read one of the two, most of them the lower case
    first. ``*`` stays alone: it counts only so.
    """
    given = [part.strip() for name in _NAMES for part in env.get(name, "").split(",") if part.strip()]
    names = ["*"] if "*" in given else dict.fromkeys([*given, *hosts, *_LOCAL])
    return dict.fromkeys(_NAMES, ",".join(names))
