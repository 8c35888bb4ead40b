"""Small questions to one server, before any rollout: does it answer, does it know us, are its log-probs the right ones?"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

_ATTEMPT_S = 5.0
_GENERATE_S = 120.0
_PROBE_IDS = [1, 2, 3, 4]
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
    """HTTP status and payload of a small request; the payload is None unless the status is 2xx, both are when nothing answers."""
    try:
        with _open(method, url, api_key, body, _ATTEMPT_S) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, None
    except _NO_ANSWER:
        return None, None


def log_probs_are_untempered(url: str, api_key: str | None) -> bool:
    """Whether a server's log-probs stay the same when the sampling temperature changes (SGLang's own do not)."""
    plain, tempered = (_next_log_probs(url, api_key, temperature) for temperature in (1.0, 0.5))
    return all(abs(a - b) < 0.01 for a, b in zip(plain, tempered, strict=True))


def _next_log_probs(url: str, api_key: str | None, temperature: float) -> list[float]:
    body = {
        "input_ids": _PROBE_IDS,
        "sampling_params": {"max_new_tokens": 1, "temperature": temperature},
        "return_logprob": True,
        "token_ids_logprob": _PROBE_IDS,
    }
    with _open("POST", f"{url}/generate", api_key, body, _GENERATE_S) as response:
        (rows,) = json.load(response)["meta_info"]["output_token_ids_logprobs"]
    return [row[0] for row in rows]


def _open(method: str, url: str, api_key: str | None, body: Any, timeout_s: float) -> Any:
    """Open ``url`` without any proxy of the environment."""
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, data=data, headers=headers, method=method), timeout=timeout_s)
