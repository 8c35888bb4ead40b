"""Answers in SGLang's ``/generate`` wire format, read as rollouts. Every field that is used is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_dypo.config.words import counted
from megatron_dypo.rollout.columns import LogprobRows
from megatron_dypo.rollout.routes import RoutesError, read_routes
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.types import Floats, Rollout, Routes, Tokens

_LARGEST_ID = 2**31 - 1
_LOGP_RANGE = (-1e4, 1e-3)
"""Range of log-probs. A rounding error may lift one above 0. SGLang writes log 0 as the lowest float, which is
refused."""
_MAX_QUOTED = 100


class IncompleteGroupError(Exception):
    """An answer that is not a whole group: a response is missing, did not end, or has an invalid field."""


class WrongVersionError(Exception):
    """A response sampled by wrong weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Response:
    """One response with valid fields. Its versions are not yet compared with those of the refits."""

    tokens: Tokens
    logp: Floats
    finish: Literal["stop", "length"]
    versions: tuple[str, ...]
    starts: tuple[int, ...]
    """Index of the first token of each version."""
    routed_experts: Any


def parse_group(
    payload: Any,
    sampling: Sampling,
    decode: Callable[[Tokens], str],
    *,
    versions: Sequence[int] | None = None,
    vocab_size: int | None = None,
    num_prompt_tokens: int = 0,
) -> tuple[Rollout, ...]:
    """Return the ``sampling.n`` rollouts of an answer.

    Args:
        payload: the decoded JSON, of any type, possibly with arrays in place of lists
            (:func:`megatron_dypo.rollout.columns.read_columns`). If it is refused, the message quotes what it has, so
            parse it again without arrays.
        versions: versions that the server may hold now, ascending; the last is that of the last refit. The newest
            version of the group must be one of them. Other tokens may be of any earlier version: a response that a
            refit paused begins with them, and other members may have ended before. None: any version.
        vocab_size: token ids must be below it. None: any id.
        num_prompt_tokens: tokens of the request, whose routes an answer with routes has too.

    Raises:
        IncompleteGroupError: the answer is not a whole group of valid responses.
        WrongVersionError: the server holds wrong weights, or a token was sampled by weights that no refit made.
    """
    outputs = payload if isinstance(payload, list) else [payload]  # an object when n = 1
    if len(outputs) != sampling.n:
        raise IncompleteGroupError(f"{len(outputs)} of {counted(sampling.n, 'response')}")
    limit = _LARGEST_ID + 1 if vocab_size is None else vocab_size
    responses = [_read(output, sampling, limit) for output in outputs]
    _require_versions(responses, versions)
    routes = _read_routes(responses, sampling, num_prompt_tokens)
    return tuple(_rollout(*pair, decode) for pair in zip(responses, routes, strict=True))


def sampled_lengths(payload: Any) -> list[int]:
    """Return the number of tokens of each response of an answer, valid or not."""
    outputs = payload if isinstance(payload, list) else [payload]
    ids = [output.get("output_ids") for output in outputs if isinstance(output, dict)]
    return [len(one) for one in ids if isinstance(one, list) and one]


def _read(output: Any, sampling: Sampling, id_limit: int) -> _Response:
    meta = output.get("meta_info") if isinstance(output, dict) else None
    if not isinstance(meta, dict):
        raise IncompleteGroupError(f"a response without meta_info: {quote(output)}")
    reason = meta.get("finish_reason")
    ending: dict[str, Any] = reason if isinstance(reason, dict) else {}
    finish = ending.get("type")
    if finish != "stop" and finish != "length":
        raise IncompleteGroupError(f"a response ended with finish_reason {quote(reason)}")
    tokens = _read_tokens(output.get("output_ids"), sampling, id_limit)
    if finish == "stop":
        _require_stop(ending.get("matched"), int(tokens[-1]), sampling)
    versions, starts = _read_spans(meta, len(tokens))
    return _Response(
        tokens=tokens,
        logp=_read_logp(meta.get("output_token_logprobs"), tokens),
        finish=finish,
        versions=versions,
        starts=starts,
        routed_experts=meta.get("routed_experts"),
    )


def _read_routes(responses: Sequence[_Response], sampling: Sampling, num_prompt_tokens: int) -> Sequence[Routes | None]:
    if sampling.routes is None:
        return [None] * len(responses)
    encoded = [response.routed_experts for response in responses]
    lengths = [num_prompt_tokens + len(response.tokens) for response in responses]
    try:
        return read_routes(encoded, lengths, sampling.routes)
    except RoutesError as error:
        raise IncompleteGroupError(str(error)) from error


def _read_tokens(ids: Any, sampling: Sampling, id_limit: int) -> Tokens:
    if not isinstance(ids, list | np.ndarray):
        raise IncompleteGroupError(f"output_ids={quote(ids)}: must be a list of token ids")
    if not len(ids):
        raise IncompleteGroupError("a response without tokens")
    if len(ids) > sampling.max_new_tokens:
        raise IncompleteGroupError(f"{len(ids)} tokens for max_new_tokens={sampling.max_new_tokens}")
    if isinstance(ids, np.ndarray) and ids.min() >= 0 and ids.max() < id_limit:
        return ids.astype(np.int32)
    for token in ids:
        if type(token) is not int or not 0 <= token < id_limit:
            raise IncompleteGroupError(f"token id {quote(token)}: must be an integer in [0, {id_limit})")
    return np.asarray(ids, dtype=np.int32)


def _require_stop(matched: Any, last: int, sampling: Sampling) -> None:
    """Require the response to end with a stop token. SGLang reports other ends as a matched text, such as ``NaN
    happened`` for logits that are not numbers."""
    if matched is not None and (type(matched) is not int or matched != last):
        raise IncompleteGroupError(f"a response that ends with token {last} stopped at {quote(matched)}")
    if sampling.stop_token_ids and last not in sampling.stop_token_ids:
        raise IncompleteGroupError(
            f"a response stopped at token {last}, which is not one of stop_token_ids={sampling.stop_token_ids} "
            "(rollout.stop_token_ids adds more)"
        )


def _read_logp(rows: Any, tokens: Tokens) -> Floats:
    """Read the log-probs from rows (log-prob, token id, text)."""
    low, high = _LOGP_RANGE
    if isinstance(rows, LogprobRows):
        if not np.array_equal(rows.ids, tokens) or rows.logp.min() < low or rows.logp.max() > high:
            raise IncompleteGroupError(f"{len(rows)} log-probs for {len(tokens)} tokens, or a wrong one")
        return rows.logp.astype(np.float32)
    rows = rows if isinstance(rows, list) else []
    sound = all(isinstance(row, list | tuple) and len(row) >= 2 and type(row[1]) is int for row in rows)
    if not sound or [row[1] for row in rows] != tokens.tolist():
        raise IncompleteGroupError(f"{len(rows)} log-probs for {len(tokens)} tokens, or of other tokens")
    for position, row in enumerate(rows):
        if type(row[0]) not in (int, float) or not low <= row[0] <= high:  # NaN is in no range
            raise IncompleteGroupError(f"log-prob {quote(row[0])} of token {position}: must be finite and at most 0")
    return np.asarray([row[0] for row in rows], dtype=np.float32)


def _read_spans(meta: dict[str, Any], num_tokens: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the versions and the index of the first token of each. A single ``weight_version`` is that of the last
    token."""
    spans = meta.get("weight_versions")
    if not spans:
        spans = [{"version": meta.get("weight_version"), "start": 0}]
    if not (isinstance(spans, list) and all(isinstance(span, dict) for span in spans)):
        raise IncompleteGroupError(f"weight_versions={quote(spans)}: must be a list of spans")
    versions, starts = [span.get("version") for span in spans], [span.get("start") for span in spans]
    if not all(isinstance(version, str) and version for version in versions):
        raise IncompleteGroupError(f"weight versions {quote(versions)}: must be strings")
    if not all(type(start) is int for start in starts) or starts[0] != 0:
        raise IncompleteGroupError(f"weight versions begin at tokens {quote(starts)}: must be integers from 0")
    if any(a >= b for a, b in zip(starts, [*starts[1:], num_tokens], strict=True)):
        raise IncompleteGroupError(f"weight versions begin at tokens {quote(starts)} of {num_tokens}: must ascend")
    return tuple(versions), tuple(starts)


def _require_versions(responses: Sequence[_Response], versions: Sequence[int] | None) -> None:
    # A restarted server says ``default``; a server on which a refit failed says ``failed-<version>``.
    names = [name for response in responses for name in response.versions]
    unknown = [name for name in names if not _is_number(name) and not (versions is None and name == "default")]
    if unknown:
        said = next(response.versions for response in responses if unknown[0] in response.versions)
        raise WrongVersionError(f"weights of version {_quote_all(said)}; {_expected(versions)}")
    for response in responses:
        numbers = [_number(name) for name in response.versions]
        if numbers != sorted(numbers):
            raise IncompleteGroupError(f"weight versions {_quote_all(response.versions)}: must ascend")
    if versions is not None:
        newest = max(responses, key=lambda response: _number(response.versions[-1]))
        if _number(newest.versions[-1]) not in versions:
            raise WrongVersionError(f"weights of version {_quote_all(newest.versions)}; {_expected(versions)}")


def _expected(versions: Sequence[int] | None) -> str:
    if versions is None:
        return "must be an integer, or 'default' before the first refit"
    before = ", ".join(map(str, versions[:-1]))
    return f"the last refit was of {versions[-1]}" + (f", the one before of {before}" if before else "")


def _is_number(version: str) -> bool:
    return version.isascii() and version.isdecimal() and len(version) <= 18


def _number(version: str) -> int:
    """Return the number of a version; ``default``, the weights that a server started with, is 0."""
    return 0 if version == "default" else int(version)


def _rollout(response: _Response, routes: Routes | None, decode: Callable[[Tokens], str]) -> Rollout:
    spans = tuple(zip(map(_number, response.versions), response.starts, strict=True))
    return Rollout(
        tokens=response.tokens,
        logp=response.logp,
        text=decode(response.tokens),
        finish=response.finish,
        policy_version=spans[0][0],
        version_spans=spans,
        routes=routes,
    )


def _quote_all(names: Sequence[str]) -> str:
    return ", ".join(name[:_MAX_QUOTED] for name in names[-8:])


def quote(value: Any) -> str:
    """Return any value as a short text for a message."""
    if isinstance(value, str | list | tuple):
        value = value[:_MAX_QUOTED]
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge integer"
    try:
        return repr(value)[:_MAX_QUOTED]
    except ValueError:  # it contains an integer of thousands of digits
        return f"a {type(value).__name__} that cannot be shown"
