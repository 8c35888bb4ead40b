"""Requests for groups in the wire format of SGLang's ``/generate``; see :mod:`megatron_dypo.rollout.responses`."""

from __future__ import annotations

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
    seed: int | None = None
    """Seed of the only rollout (``n`` is 1), for servers with ``--enable-deterministic-inference``."""
    routes: RouteShape | None = None
    """The answer brings the server's choice of experts, of these sizes; None: it brings none."""

    def max_answer_bytes(self, num_prompt_tokens: int) -> int:
        """Return the size above which an answer cannot belong to this request."""
        routes = 0 if self.routes is None else self.routes.answer_bytes_per_token
        per_rollout = self.max_new_tokens * (_BYTES_PER_TOKEN + routes) + num_prompt_tokens * routes
        return _BYTES_PER_ANSWER + self.n * per_rollout


def request_body(prompt_tokens: Tokens, sampling: Sampling) -> dict[str, Any]:
    """Return the body of one request for a whole group. SGLang then computes the prompt once for all ``n`` samples."""
    return {
        "input_ids": prompt_tokens.tolist(),
        "sampling_params": {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids),
            **({} if sampling.seed is None else {"sampling_seed": sampling.seed}),
        },
        "return_logprob": True,
        "logprob_start_len": -1,  # no log-probs of the prompt
        **({} if sampling.routes is None else {"return_routed_experts": True}),
    }
