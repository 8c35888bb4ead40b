"""Endpoints given by URL: their host and path, and whether they answer, take the key and have the model."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from megatron_dypo.checks import require
from megatron_dypo.config.urls import require_urls
from megatron_dypo.rollout.server.probe import require_answer, served_models


def reach_openai(urls: Sequence[str], *, model: str, api_key: str | None, key_name: str) -> tuple[tuple[str, ...], str]:
    """Return the hosts of endpoints with OpenAI's API and the path of the API, having seen that each answers.

    Args:
        key_name: the environment variable of the key, for messages.

    Raises:
        ValueError: the paths differ; nothing answers at a URL, it refuses the key, or it does not serve the model.
    """
    hosts, base = split_urls(urls)
    for host in hosts:
        status, names = served_models(f"{host}{base}", api_key)
        require_answer(f"{host}{base}", status, key_name)
        require(not names or model in names, f"model={model!r}", f"{host}{base} serves {', '.join(names[:10])}")
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
