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


def http_status(url: str, api_key: str | None) -> int | None:
    """HTTP status of a GET; None when nothing answers."""
    return _status(url, api_key, None)


def post_status(url: str, api_key: str | None) -> int | None:
    """HTTP status of a POST of an empty object; None when nothing answers."""
    return _status(url, api_key, {})


def _status(url: str, api_key: str | None, body: Any) -> int | None:
    try:
        with _open(url, api_key, body, _ATTEMPT_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):  # refused, reset, timed out, cut short: not up yet
        return None


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
    with _open(f"{url}/generate", api_key, body, _GENERATE_S) as response:
        (rows,) = json.load(response)["meta_info"]["output_token_ids_logprobs"]
    return [row[0] for row in rows]


def _open(url: str, api_key: str | None, body: Any, timeout_s: float) -> Any:
    """Open ``url`` without any proxy of the environment."""
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, data=data, headers=headers), timeout=timeout_s)
