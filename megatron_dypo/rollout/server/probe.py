"""Small questions to one server, before any rollout: does it answer, does it know us, are its log-probs the right ones?"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from typing import Any

_ATTEMPT_S = 5.0
_GENERATE_S = 120.0
_PROBE_IDS = [1, 2, 3, 4]
_MAX_BYTES = 2**20
_NO_ANSWER = (OSError, http.client.HTTPException)
"""Refused, reset, timed out, cut short: not up yet."""


def http_status(url: str, api_key: str | None) -> int | None:
    """HTTP status of a GET; None when nothing answers."""
    try:
        with _open("GET", url, api_key, None, _ATTEMPT_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except _NO_ANSWER:
        return None


def request_json(method: str, url: str, api_key: str | None, body: Any = None) -> tuple[int | None, Any]:
    """HTTP status and payload of a small request; both are None when nothing answers.

    The payload is None unless the status is 2xx and the body is JSON of at most 1 MiB.
    """
    try:
        with _open(method, url, api_key, body, _ATTEMPT_S) as response:
            return response.status, _decode(response.read(_MAX_BYTES + 1))
    except urllib.error.HTTPError as error:
        return error.code, None
    except _NO_ANSWER:
        return None, None


def _decode(body: bytes) -> Any:
    """The JSON of a body; None if it is none, or too long."""
    try:
        return json.loads(body) if len(body) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        return None


def log_probs_are_untempered(url: str, api_key: str | None) -> bool:
    """Whether a server's log-probs stay the same when the sampling temperature changes (SGLang's own do not).

    Raises:
        ValueError: it does not answer with log-probs at all.
    """
    plain, tempered = (_next_log_probs(url, api_key, temperature) for temperature in (1.0, 0.5))
    return all(abs(a - b) < 0.01 for a, b in zip(plain, tempered, strict=True))


def _next_log_probs(url: str, api_key: str | None, temperature: float) -> list[float]:
    body = {
        "input_ids": _PROBE_IDS,
        "sampling_params": {"max_new_tokens": 1, "temperature": temperature},
        "return_logprob": True,
        "token_ids_logprob": _PROBE_IDS,
    }
    try:
        with _open("POST", f"{url}/generate", api_key, body, _GENERATE_S) as response:
            payload = _decode(response.read(_MAX_BYTES + 1))
        (rows,) = payload["meta_info"]["output_token_ids_logprobs"]
        found = [float(row[0]) for row in rows]
    except (*_NO_ANSWER, LookupError, TypeError, ValueError) as error:  # an HTTPError is an OSError
        raise ValueError(f"{url}/generate does not give log-probs as SGLang does: {error!r}") from error
    if len(found) != len(_PROBE_IDS) or not all(map(math.isfinite, found)):
        raise ValueError(f"{url}/generate: log-probs {found[:8]} of tokens {_PROBE_IDS}: must be finite, one for each")
    return found


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an HTTP error: to follow it would hand the key to another place."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _open(method: str, url: str, api_key: str | None, body: Any, timeout_s: float) -> Any:
    """Open ``url`` without any proxy of the environment and without following redirects."""
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    return opener.open(urllib.request.Request(url, data=data, headers=headers, method=method), timeout=timeout_s)
