"""Endpoints given by URL: their host and path, and whether they answer, take the key and have the model."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from megatron_dypo.checks import require
from megatron_dypo.config.urls import require_urls
from megatron_dypo.rollout.server.probe import request_json


def require_answer(url: str, status: int | None, key_name: str) -> None:
    """Raise ValueError where nothing answered (``status`` None), or the key of ``key_name`` was refused."""
    if status is None:
        raise ValueError(f"{url}: nothing answers there: start the server first, or correct the URL")
    if status in (401, 403):
        raise ValueError(f"{url} refuses the API key: set {key_name} to the key of the servers")


def reach_openai(urls: Sequence[str], *, model: str, api_key: str | None, key_name: str) -> tuple[tuple[str, ...], str]:
    """Return the hosts of endpoints with OpenAI's API and the path of the API, having seen that each answers.

    Args:
        key_name: the environment variable of the key, for messages.

    Raises:
        ValueError: the paths differ; nothing answers at a URL, it refuses the key, or it does not serve the model.
    """
    hosts, base = split_urls(urls)
    for host in hosts:
        status, listed = request_json("GET", f"{host}{base}/models", api_key)
        require_answer(f"{host}{base}", status, key_name)
        data = listed.get("data") if isinstance(listed, dict) else None
        names = [one.get("id") for one in data if isinstance(one, dict)] if isinstance(data, list) else []
        require(
            not names or model in names,
            f"model={model!r}",
            f"{host}{base} serves {', '.join(map(str, names[:10]))}",
        )
    return hosts, base


def split_urls(urls: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Return scheme, host and port of each URL, and the path that all have: that of the API, ``/v1`` without one."""
    paths = {urlsplit(url).path.rstrip("/") or "/v1" for url in urls}
    require(len(paths) == 1, f"urls={list(urls)}", "must have the same path, that of the API")
    (base,) = paths
    return tuple(url_without_path(url) for url in urls), base


def url_without_path(url: str) -> str:
    """Return scheme, host and port of a URL.

    Raises:
        ValueError: it has none, or a query or a password besides.
    """
    parts = urlsplit(url)
    bare = f"{parts.scheme}://{parts.netloc}"
    require_urls((bare,), "url")
    require(not parts.query and not parts.fragment, f"url={url!r}", "must have neither a query nor a fragment")
    return bare
