"""Answers of SGLang's control routes, bounded and checked, and the errors of failed calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from megatron_dypo.config.server_flags import settings_of
from megatron_dypo.json_text import parse_json
from megatron_dypo.supported import WEIGHT_SESSIONS, is_at_least

Answer = dict[str, Any]

MAX_ANSWER_BYTES = 16 * 2**20
"""A longer answer is an error. SGLang's longest answer, ``/server_info``, has about ten kB."""
_QUOTED_CHARACTERS = 500


class ServerError(RuntimeError):
    """A server refused a call, gave an invalid answer, or did not answer."""

    def __init__(self, message: str, *urls: str, is_silent: bool = False) -> None:
        """``urls``: the servers at fault; none if all failed in the same way."""
        super().__init__(message)
        self.urls = urls
        self.is_silent = is_silent
        """Whether there was no answer, not even a refusal."""

    @property
    def url(self) -> str | None:
        """Return the server at fault, or the first of several; None: no server in particular."""
        return self.urls[0] if self.urls else None


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """A server's model and sizes, as the server reports them."""

    url: str
    sglang: str
    """Version of SGLang; empty if the server does not say it."""
    model_path: str
    model_type: str
    weight_version: str
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    expert_parallel: int
    attention_data: int = 1
    """Copies of attention, whose ranks attend to requests of their own."""
    output_by_attention: bool = False
    """Whether the output layer is split over the ranks of a copy of attention, not over all."""
    dense_tensor: int | None = None
    """``--moe-dense-tp-size``."""
    dispatch: str = "none"
    """``--moe-a2a-backend``."""
    custom_loaders: tuple[str, ...]
    """``--custom-weight-loader``: import paths of functions that the server can use to receive weights."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that some transports cannot serve; see :func:`megatron_dypo.config.server_flags.settings_of`."""

    @property
    def has_sessions(self) -> bool:
        """Return whether updates stand in a session, ``/begin_weight_update`` to ``/end_weight_update``."""
        return not self.sglang or is_at_least(self.sglang, WEIGHT_SESSIONS)


def server_info(url: str, model: Answer, server: Answer) -> ServerInfo:
    """Return the facts in a server's answers to ``/model_info`` and ``/server_info``."""
    # With copies of attention, SGLang before 0.5.23 gives their number as dp_size; later ones allow no replicas.
    has_copies, data = bool(server.get("enable_dp_attention")), int(server.get("dp_size") or 1)
    dense_tensor = server.get("moe_dense_tp_size")
    return ServerInfo(
        url=url,
        sglang=str(server.get("version") or ""),
        model_path=str(model.get("model_path")),
        model_type=str(model.get("model_type")),
        weight_version=str(model.get("weight_version")),
        tensor_parallel=int(server.get("tp_size", 1)),
        pipeline_parallel=int(server.get("pp_size", 1)),
        data_parallel=1 if has_copies else data,
        expert_parallel=int(server.get("ep_size", 1)),
        attention_data=int(server.get("attn_dp_size") or (data if has_copies else 1)),
        output_by_attention=bool(server.get("enable_dp_lm_head")),
        dense_tensor=None if dense_tensor is None else int(dense_tensor),
        dispatch=str(server.get("moe_a2a_backend") or "none"),
        custom_loaders=tuple(server.get("custom_weight_loader") or ()),
        settings=settings_of(server),
    )


class UnansweredError(ServerError):
    """A call that was sent and got no answer in time."""


async def read(response: aiohttp.ClientResponse, where: str, url: str) -> str:
    """Read an answer, which must not be longer than ``MAX_ANSWER_BYTES``."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise ServerError(
                f"{where}: status {response.status}: an answer of more than {MAX_ANSWER_BYTES} bytes", url
            )
    return body.decode(errors="replace")


def joined(errors: Sequence[ServerError], *, is_collective: bool) -> ServerError:
    """Return one error for the errors of several servers.

    In a collective call one failing server makes the others fail or wait. So if a server is gone, only that one is at
    fault, and servers that only wait are not.
    """
    blamed = [error for error in errors if not (is_collective and isinstance(error, UnansweredError))]
    gone = [error for error in blamed if error.is_silent]
    blamed = gone if is_collective and gone else blamed
    urls = [url for error in blamed for url in error.urls]
    return ServerError("; ".join(map(str, errors)), *urls, is_silent=all(error.is_silent for error in errors))


def checked(where: str, url: str, status: int, text: str) -> Answer:
    """Return the JSON object of an answer, {} for plain text.

    Raises:
        ServerError: a refusal, which may come with status 200 and ``success: false``.
    """
    try:
        answer = parse_json(text)
    except ValueError:
        answer = {}
    answer = answer if isinstance(answer, dict) else {}
    if status != 200 or answer.get("success", True) is not True:
        raise ServerError(f"{where}: status {status}: {answer.get('message') or text[:_QUOTED_CHARACTERS]}", url)
    return answer
