"""The section ``teacher_servers`` of the configuration: servers of a teacher that gives log-probs of rollouts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.rollout import MAX_DEADLINE_S
from megatron_dypo.config.urls import require_urls


@dataclass(frozen=True, kw_only=True)
class TeacherServersConfig:
    """Running servers of one teacher model, for objectives that read its log-probs of the policy's own rollouts.

    The teacher must have the policy's tokenizer. The run checks that when it starts.
    """

    urls: tuple[str, ...] = ()
    """Servers of the teacher, as ``http://HOST:PORT``. Each request goes to the least loaded one."""
    api: Literal["sglang", "openai"] = "sglang"
    """``sglang``: SGLang's ``/generate``. ``openai``: ``/v1/completions`` with ``echo`` and ``logprobs``, and vLLM's
    ``/tokenize`` and ``/detokenize``."""
    model: str | None = None
    """Name under which the servers know the model, for ``api: openai``."""
    api_key_env: str = "DYPO_TEACHER_API_KEY"
    """Name of the environment variable with the servers' API key. If it is unset, none is sent."""
    max_in_flight: int = 32
    """Most open requests of one data-parallel rank; each is for one rollout."""
    request_deadline_s: float = 600.0
    """Give up a rollout after this many seconds, all attempts together."""
    retries: int = 3
    """Further attempts after the first one. Without an answer the prompt is dropped and counted."""

    def __post_init__(self) -> None:
        require_urls(self.urls, "urls")
        require_positive(self, "max_in_flight")
        require_not_negative(self, "retries")
        require(
            0 < self.request_deadline_s <= MAX_DEADLINE_S,
            f"request_deadline_s={self.request_deadline_s}",
            f"must be above 0 and at most {MAX_DEADLINE_S:g} seconds",
        )
        is_name = bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env))
        # A key that was written here by mistake must not be shown.
        require(is_name, "api_key_env", "must be the name of an environment variable: letters, digits and _")
        has_model = self.model is not None and bool(self.model.strip())
        require(
            has_model == (self.api == "openai"), f"model={self.model!r}", "is needed by api: openai, and by it alone"
        )
