"""SGLang's ``/generate`` wire format: request bodies out, rollouts in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dypo.types import Rollout, Tokens


class IncompleteGroupError(Exception):
    """A response with fewer rollouts than asked for, or with one that did not end by itself or at the limit."""


class WrongVersionError(Exception):
    """A response of other weights than those of the last push."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one group is sampled."""

    n: int
    temperature: float
    max_new_tokens: int
    top_p: float
    top_k: int
    stop_token_ids: tuple[int, ...]


def request_body(prompt_tokens: Tokens, sampling: Sampling) -> dict[str, Any]:
    """One request for a whole group: SGLang computes the prompt once and shares it among the ``n`` samples."""
    return {
        "input_ids": prompt_tokens.tolist(),
        "sampling_params": {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids),
        },
        "return_logprob": True,
        "logprob_start_len": -1,  # none for the prompt
    }


def parse_group(
    payload: Any, n: int, decode: Callable[[Tokens], str], *, versions: range | None = None
) -> tuple[Rollout, ...]:
    """The ``n`` rollouts of a response.

    Args:
        versions: of which one must end each response; the last of them is that of the last push. A response that a
            push paused begins with older ones. None: any.

    Raises:
        IncompleteGroupError: one is missing or was aborted, or its log-probs do not match its tokens.
        WrongVersionError: one was sampled, at least in part, by weights that no push made, or ends with older ones.
    """
    outputs: Sequence[Any] = payload if isinstance(payload, list) else [payload]  # an object when n = 1
    if len(outputs) != n:
        raise IncompleteGroupError(f"{len(outputs)} of {n} responses")
    if versions is not None:
        for output in outputs:
            _require_version(output["meta_info"], versions)
    return tuple(_parse_rollout(output, decode) for output in outputs)


def _parse_rollout(output: dict[str, Any], decode: Callable[[Tokens], str]) -> Rollout:
    meta = output["meta_info"]
    finish = (meta["finish_reason"] or {}).get("type")
    if finish not in ("stop", "length"):
        raise IncompleteGroupError(f"a response ended with finish_reason {meta['finish_reason']}")
    tokens = np.asarray(output["output_ids"], dtype=np.int32)
    rows = meta["output_token_logprobs"]  # (log-prob, token id, text)
    if [row[1] for row in rows] != tokens.tolist():
        raise IncompleteGroupError(f"{len(rows)} log-probs for {len(tokens)} tokens, or of other tokens")
    if not len(tokens):
        raise IncompleteGroupError("a response without tokens")
    spans = tuple((_version_number(span["version"]), int(span["start"])) for span in _spans(meta))
    return Rollout(
        tokens=tokens,
        logp=np.asarray([row[0] for row in rows], dtype=np.float32),
        text=decode(tokens),
        finish=finish,
        policy_version=min(version for version, _ in spans),
        version_spans=spans,
    )


def _spans(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """``{"version", "start", "end"}`` of all tokens, in their order; ``weight_version`` alone is that of the last one."""
    return meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": None}]


def _require_version(meta: dict[str, Any], versions: range) -> None:
    # A server that was started again says ``default``, one that a push failed on ``failed-<version>``.
    *before, last = (span["version"] for span in _spans(meta))
    if not (last.isdecimal() and int(last) in versions and all(one.isdecimal() for one in before)):
        wanted = f"{versions[-1]}" if len(versions) == 1 else f"{versions[-1]}, {versions[0]} is the oldest to take"
        raise WrongVersionError(f"weights of version {', '.join([*before, last])}; the last push was of {wanted}")


def _version_number(version: str) -> int:
    """``default``, the weights that a server started with, is version 0.

    Raises:
        ValueError: neither ``default`` nor an integer.
    """
    if version == "default":
        return 0
    if not version.isdecimal():
        raise ValueError(f"weight_version={version!r}: must be an integer, or 'default' before the first push")
    return int(version)
