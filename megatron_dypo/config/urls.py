"""Rules for the URLs in a config: scheme, host and port of a server or router, and nothing more."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from megatron_dypo.checks import require

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def require_urls(urls: Sequence[str], name: str) -> None:
    """Require each of ``urls`` to be ``http(s)://HOST[:PORT]``, and all to be different places.

    Raises:
        ValueError: names the URL, without its password, and the rule that it breaks.
    """
    places: dict[tuple[str, int], str] = {}
    for url in urls:
        place = _place(url, name)
        require(place not in places, f"{name}={url!r}", f"is given twice: {places.get(place)!r} is the same server")
        places[place] = url


def require_host(host: str, name: str) -> None:
    """Require ``host`` to be a host name or an IP address, without scheme and port."""
    require(_is_host(host), f"{name}={host!r}", "must be a host name or an IP address, without scheme and port")


def url_host(url: str) -> str:
    """Return the host of a URL that :func:`require_urls` accepted."""
    return urlsplit(url).hostname or ""


def _place(url: str, name: str) -> tuple[str, int]:
    """Return host and port of a URL, or raise ValueError if it breaks a rule."""
    shown = re.sub(r"//[^/]*@", "//***@", url)
    form = "must be http://HOST:PORT or https://HOST:PORT"
    try:
        parts, port = urlsplit(url), urlsplit(url).port
    except ValueError as error:  # the port is no number up to 65535, or a bracket is missing
        raise ValueError(f"{name}={shown!r}: {form}: {error}") from error
    require(parts.scheme in _DEFAULT_PORTS, f"{name}={shown!r}", form)
    require(
        "@" not in parts.netloc, f"{name}={shown!r}", f"{form}: a key is given by api_key_env, not by user and password"
    )
    require(_is_host(parts.hostname or ""), f"{name}={shown!r}", f"{form}: {parts.hostname or ''!r} is no host")
    require(port != 0 and not parts.netloc.endswith(":"), f"{name}={shown!r}", f"{form}: a port is from 1 to 65535")
    require(_has_no_more(parts, url), f"{name}={shown!r}", f"{form} and nothing more: no path, query or fragment")
    return (parts.hostname or "").rstrip("."), port or _DEFAULT_PORTS[parts.scheme]


def _has_no_more(parts: SplitResult, url: str) -> bool:
    return parts.path in ("", "/") and not any(mark in url for mark in "?# \t\r\n\\")


def _is_host(host: str) -> bool:
    if ":" in host or host.replace(".", "").isdigit():
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True
    return bool(_NAME.fullmatch(host.removesuffix("."))) and ".." not in host and len(host) <= 253
