"""Small requests to one server before any rollout: does it answer, accept the key, give log-probs at temperature 1?"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import aiohttp

from megatron_dypo.json_text import parse_json

HEALTH_EVERY_S = 0.2
"""Seconds between two looks at a starting server. SGLang announces only in /health that it is up."""
_ATTEMPT_S = 5.0
_GENERATE_S = 120.0
_PROBE_IDS = [1, 2, 3, 4]
_MAX_BYTES = 2**20


def http_status(url: str, api_key: str | None) -> int | None:
    """Return the HTTP status of a GET; None if nothing answers."""
    return request_json("GET", url, api_key)[0]


def request_json(
    method: str, url: str, api_key: str | None, body: Any = None, *, timeout_s: float = _ATTEMPT_S
) -> tuple[int | None, Any]:
    """Return HTTP status and payload of a small request; both are None if nothing answers.

    The payload is None unless the status is 2xx and the body is JSON of at most 1 MiB. Proxies of the environment are
    not used. Redirects are not followed, since they would send the key to another host. Blocks: call it outside of
    event loops.
    """
    return asyncio.run(_request(method, url, api_key, body, timeout_s))


def server_setting(url: str, api_key: str | None, name: str) -> Any:
    """Return a setting of a server by its name in ``/server_info``; None if it is not told."""
    info = request_json("GET", f"{url}/server_info", api_key)[1]
    return info.get(name) if isinstance(info, dict) else None


def require_answer(url: str, status: int | None, key_name: str) -> None:
    """Raise ValueError where nothing answered (``status`` None), or the key of ``key_name`` was refused."""
    if status is None:
        raise ValueError(f"{url}: nothing answers there: start the server first, or correct the URL")
    if status in (401, 403):
        raise ValueError(f"{url} refuses the API key: set {key_name} to the key of the servers")


def served_models(base: str, api_key: str | None) -> tuple[int | None, list[str]]:
    """Ask OpenAI's API at ``base`` (``http://HOST:PORT/v1``) for its models; return HTTP status and names.

    The status is None if nothing answers. The names are [] if the answer is not OpenAI's.
    """
    status, listed = request_json("GET", f"{base}/models", api_key)
    data = listed.get("data") if isinstance(listed, dict) else None
    names = [one.get("id") for one in data if isinstance(one, dict)] if isinstance(data, list) else []
    return status, [name for name in names if isinstance(name, str)]


async def _request(method: str, url: str, api_key: str | None, body: Any, timeout_s: float) -> tuple[int | None, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limit = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=limit, trust_env=False, auto_decompress=False) as session,
            session.request(method, url, json=body, allow_redirects=False) as response,
        ):
            if response.status // 100 != 2:
                return response.status, None
            return response.status, _decode(await _beginning(response))
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError):  # refused, reset, timed out, cut short: not up yet
        return None, None


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """Return the body, cut off one byte after the limit."""
    body = b""
    while len(body) <= _MAX_BYTES and (chunk := await response.content.read(_MAX_BYTES + 1 - len(body))):
        body += chunk
    return body


def _decode(body: bytes) -> Any:
    """Return the JSON of a body; None if it is no JSON or too long."""
    try:
        return parse_json(body) if len(body) <= _MAX_BYTES else None
    except ValueError:
        return None


def log_probs_are_untempered(url: str, api_key: str | None) -> bool:
    """Return whether a server's log-probs stay the same when the sampling temperature changes (SGLang's own do not).

    Raises:
        ValueError: its answer has no log-probs.
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
    status, payload = request_json("POST", f"{url}/generate", api_key, body, timeout_s=_GENERATE_S)
    try:
        (rows,) = payload["meta_info"]["output_token_ids_logprobs"]
        found = [float(row[0]) for row in rows]
    except (LookupError, TypeError, ValueError) as error:
        said = "no answer" if status is None else f"HTTP {status}: {error!r}"
        raise ValueError(f"{url}/generate does not give log-probs as SGLang does: {said}") from error
    if len(found) != len(_PROBE_IDS) or not all(map(math.isfinite, found)):
        raise ValueError(f"{url}/generate: log-probs {found[:8]} of tokens {_PROBE_IDS}: must be finite, one for each")
    return found
