"""One POST to a server: its answer, or an error whose class says who is at fault."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import functools
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from megatron_dypo.json_text import parse_json
from megatron_dypo.rollout.columns import read_columns
from megatron_dypo.rollout.descriptors import lacks_descriptors
from megatron_dypo.rollout.router import NO_SERVER

QUOTED_CHARACTERS = 200
"""Characters of a body that a message quotes."""
_QUOTED_BYTES = 4096
_CONNECT_S = 10.0
_REFUSALS = (400, 413, 422)
"""Statuses that say that the request itself is at fault: the same one would be refused again."""
_KEY_REFUSALS = (401, 403)
BUSY = (429, 503)
"""Statuses that say that the request was not taken, and may be sent again."""
_OWN_LACKS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN}
"""Errors of a host without descriptors, buffers, memory or ports. The server is not at fault."""
_GONE = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN}
"""Errors that mean that nothing listens at the address, or that the host is down."""


class AskError(Exception):
    """One attempt without a usable answer."""


class AttemptError(AskError):
    """A failure that is worth another attempt."""


class KeyRefusedError(AttemptError):
    """The server refuses the API key (HTTP 401 or 403)."""


class BusyError(AskError):
    """The server takes no request now (HTTP 429 or 503). ``retry_after_s``: the pause that it asks for, or 0."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LostServerError(AskError):
    """The server has gone, or serves other weights."""


class RefusedError(AskError):
    """The server refuses this request for good."""


class OwnLackError(AskError):
    """This host could not open a connection."""


class Answer:
    """A whole answer with status 200, decoded when it is asked for. Each decoding takes time in proportion to its size.

    Args:
        chunks: the body.
        api_key: never shown.
    """

    def __init__(self, url: str, chunks: Sequence[bytes], api_key: str | None) -> None:
        self._url, self._chunks, self._api_key = url, chunks, api_key
        self.num_bytes = sum(map(len, chunks))

    @property
    def shown(self) -> str:
        """The part of it that a message may show."""
        return f"{self._url}: HTTP 200: {shown(self._body, self._api_key)}"

    @property
    def payload(self) -> Any:
        """The answer's JSON. Raises :class:`AttemptError` if it has none."""
        return self._decoded(parse_json)

    @property
    def columns(self) -> Any:
        """The answer's JSON with arrays (:func:`read_columns`). Raises :class:`AttemptError` if it has none."""
        return self._decoded(read_columns)

    def free(self) -> None:
        """Give the memory of the body back. Nothing may be read from the answer afterwards."""
        self._chunks = ()
        self.__dict__.pop("_body", None)

    @functools.cached_property
    def _body(self) -> bytes:
        body = b"".join(self._chunks)
        self._chunks = ()
        return body

    def _decoded(self, decode: Callable[[bytes], Any]) -> Any:
        try:
            return decode(self._body)
        except (ValueError, RecursionError) as error:
            message = f"and no JSON ({type(error).__name__}): {shown(self._body, self._api_key)}"
            raise AttemptError(f"{self._url}: HTTP 200, {message}") from error


def without_key(message: str, api_key: str | None) -> str:
    """Return the message without the key, which a server may have sent back."""
    return message.replace(api_key, "***") if api_key else message


def shown(body: bytes, api_key: str | None) -> str:
    """Return the first characters of a body on one line, without the key."""
    text = without_key(body[:_QUOTED_BYTES].decode(errors="replace"), api_key)
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text[:QUOTED_CHARACTERS] or "an empty body"


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    *,
    timeout_s: float,
    max_bytes: int,
    api_key: str | None,
    taking: Callable[[int | None], AbstractAsyncContextManager[None]],
) -> Answer:
    """POST ``body`` to ``url`` and return the answer.

    Args:
        url: redirects are not followed, since they would send the key to another host.
        timeout_s: time for the whole answer; connecting may take 10 s of it.
        max_bytes: a longer answer is cut off.
        taking: given the size of an answer, if it is known, waits until there is memory for it, and counts it.

    Raises:
        AttemptError: no answer in time, one of a failing server or of something else than SGLang, or a too long one.
        BusyError: the server takes no request now.
        LostServerError: nothing listens there, or the router has no server.
        RefusedError: the server refuses the request for good.
        OwnLackError: this host has no descriptor or port left for a connection.
    """
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    limit = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S)
    try:
        async with session.post(url, data=body, headers=headers, allow_redirects=False, timeout=limit) as response:
            is_good = response.status == 200
            async with taking(response.content_length if is_good else 0):
                chunks, is_whole = await _read(response, max_bytes if is_good else _QUOTED_BYTES)
    except aiohttp.ClientSSLError as error:  # a subclass of the next one
        raise AttemptError(f"{url}: {error}") from error
    except aiohttp.ClientConnectorError as error:
        raise connect_failure(url, error) from error
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        raise AttemptError(without_key(f"{url}: {error!r}", api_key)) from error
    if is_good and is_whole and NO_SERVER[0] not in response.headers:
        return Answer(url, chunks, api_key)
    beginning = shown(b"".join(chunks)[:_QUOTED_BYTES], api_key)
    message = f"{url}: HTTP {response.status}: {beginning}"
    if response.headers.get(NO_SERVER[0]) == NO_SERVER[1]:
        raise LostServerError(message)
    if response.status in _REFUSALS:
        raise RefusedError(message)
    if response.status in _KEY_REFUSALS:
        raise KeyRefusedError(message)
    if response.status in BUSY:
        raise BusyError(message, _retry_after_s(response.headers.get("Retry-After")))
    if not is_good:
        raise AttemptError(message)
    if not is_whole:
        raise AttemptError(f"{url}: HTTP 200: an answer of more than {max_bytes} bytes, cut off: {beginning}")
    return Answer(url, chunks, api_key)


def _retry_after_s(value: str | None) -> float:
    """Return the seconds of a header ``Retry-After``, which has a number or a date; 0 where it has neither."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> tuple[list[bytes], bool]:
    """Return the chunks of the first ``max_bytes`` of the body, and whether that is all of it."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            response.close()
            return chunks, False
    return chunks, True


def connect_failure(url: str, error: aiohttp.ClientConnectorError) -> Exception:
    """Return the error whose class says who is at fault for a failed connection."""
    message = f"{url}: {error}"
    # A host with several addresses may fail in several ways. Only the text has all of them.
    numbers = {int(found) for found in re.findall(r"\[Errno (-?\d+)\]", str(error.os_error))}
    numbers |= {error.os_error.errno} if isinstance(error.os_error.errno, int) else set()
    if numbers & _OWN_LACKS:
        return OwnLackError(message)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return OwnLackError(message) if lacks_descriptors() else AttemptError(message)
    if numbers & _GONE:
        return LostServerError(message)
    if errno.EADDRNOTAVAIL in numbers:  # all local ports are in use
        return OwnLackError(message)
    return AttemptError(message)
