"""Requests for groups in the wire format of SGLang's ``/generate``; see :mod:`megatron_dypo.rollout.responses`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dypo.rollout.routes import RouteShape
from megatron_dypo.types import Tokens

_BYTES_PER_TOKEN = 512
"""Bytes allowed for a token in an answer. Its id (twice), log-prob, text and the fields around them take about 100."""
_BYTES_PER_ANSWER = 2**20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling parameters of one group."""

    n: int
    temperature: float
    max_new_tokens: int
    top_p: float
    top_k: int
    stop_token_ids: tuple[int, ...]
    seeds: tuple[int, ...] = ()
    """Seed of each rollout, for servers with ``--enable-deterministic-inference``; (): none is sent."""
    run_seed: int | None = None
    """The run's seed: groups get :attr:`seeds` that follow from it (:func:`group_seeds`). None: they get none."""
    routes: RouteShape | None = None
    """The answer brings the server's choice of experts, of these sizes; None: it brings none."""

    def max_answer_bytes(self, num_prompt_tokens: int) -> int:
        """Return the size above which an answer cannot belong to this request."""
        routes = 0 if self.routes is None else self.routes.answer_bytes_per_token
        per_rollout = self.max_new_tokens * (_BYTES_PER_TOKEN + routes) + num_prompt_tokens * routes
        return _BYTES_PER_ANSWER + self.n * per_rollout


def group_seeds(run_seed: int, draw: int, places: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds of the rollouts at ``places`` of a draw's group: the same ones when the draw is made again."""
    keys = (f"{run_seed} {draw} {place}".encode() for place in places)
    return tuple(int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1 for key in keys)


def request_body(prompt_tokens: Tokens, sampling: Sampling) -> dict[str, Any]:
    """Return the body of one request for a whole group. SGLang then computes the prompt once for all ``n`` samples.

    With seeds it is a batch of ``n`` requests: a server that honours seeds gives all samples of one request the same
    seed, so they would be the same response.
    """
    ids = prompt_tokens.tolist()
    shared = {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if len(sampling.seeds) > 1:
        asked: dict[str, Any] = {
            "input_ids": [ids] * sampling.n,
            "sampling_params": [{"n": 1, **shared, "sampling_seed": seed} for seed in sampling.seeds],
        }
    else:
        seed = {"sampling_seed": sampling.seeds[0]} if sampling.seeds else {}
        asked = {"input_ids": ids, "sampling_params": {"n": sampling.n, **shared, **seed}}
    return {
        **asked,
        "return_logprob": True,
        "logprob_start_len": -1,  # no log-probs of the prompt
        **({} if sampling.routes is None else {"return_routed_experts": True}),
    }
