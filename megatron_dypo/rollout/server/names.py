"""The host names in servers' URLs, looked up before anybody waits for the servers."""

from __future__ import annotations

import logging
import platform
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from megatron_dypo.parallel.interfaces import is_loopback

_log = logging.getLogger(__name__)
_ATTEMPTS, _PAUSE_S = 3, 2.0
"""A name server may be too busy to answer at once."""


def require_known_hosts(urls: Sequence[str]) -> None:
    """Require an address for the host of each URL. Log a warning for another host's name that means this host.

    Raises:
        ValueError: this host knows no address for a name.
    """
    for url in urls:
        host = urlsplit(url).hostname or ""
        addresses = _addresses(host)
        if not addresses:
            raise ValueError(
                f"rollout.servers.urls: {url}: {platform.node()} knows no address for {host}: give an address, or a "
                "name that all nodes know (slurm/: NODE_DOMAIN is added to the names of nodes)"
            )
        is_here = all(map(is_loopback, addresses))
        if is_here and not is_loopback(host) and host not in (platform.node(), socket.getfqdn()):
            _log.warning(
                "%s: %s looks up %s as %s, which is this host itself: if the server runs on another host, correct "
                "/etc/hosts or the URL",
                *(url, platform.node(), host, ", ".join(addresses)),
            )


def _addresses(host: str) -> list[str]:
    for attempt in range(_ATTEMPTS):
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or attempt == _ATTEMPTS - 1:
                return []
            time.sleep(_PAUSE_S)
        except UnicodeError:  # a label that no name can have
            return []
    return []
