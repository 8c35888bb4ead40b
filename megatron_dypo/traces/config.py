"""The configuration of ``tools/generate_traces.py``: teachers, how to ask them, and verifiers of their traces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dypo.checks import require, require_not_negative, require_positive, require_sound_values
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.rollout import MAX_DEADLINE_S
from megatron_dypo.eval.reaching import split_urls

MAX_SAMPLES = 1024
MAX_KEPT = 16
_MAX_NAME = 80
_MAX_SEED = 2**31


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One teacher: SGLang servers, or any endpoint with OpenAI's API."""

    urls: tuple[str, ...]
    """``http(s)://HOST[:PORT][/PATH]``. PATH is the API's path; default ``/v1``. Several URLs share the work."""
    model: str
    """Name of the model at the endpoint."""
    api: Literal["chat", "completions"] = "chat"
    """``chat`` sends messages, which the endpoint renders; ``completions`` sends the prompt's text unchanged."""
    api_key_env: str | None = None
    """Name of the environment variable with the key. ``null``: no key is sent."""
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = -1
    """-1: all tokens."""
    max_tokens: int = 16384
    """Most tokens of a response. A response that is cut at this limit is not kept."""
    samples: int = 4
    """Most responses to one prompt. They are asked for one after the other, until ``keep`` are right."""
    keep: int = 1
    """Most right responses that are kept for each prompt, all different; the second is called ``NAME#2``."""
    requests_per_s: float | None = None
    """Most requests that begin in a second. ``null``: no limit."""
    max_in_flight: int = 32
    """Most requests that are open at once."""
    request_deadline_s: float = 1800.0
    """Seconds for one response, from its first attempt to its last."""
    retries: int = 3
    """Attempts after the first that may fail. A pause that the server asks for (HTTP 429 with Retry-After) costs
    none."""
    price_in: float = 0.0
    """Price of a million tokens of prompts."""
    price_out: float = 0.0
    """Price of a million tokens of responses."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of each request, such as ``{chat_template_kwargs: {enable_thinking: true}}``. They are written to a
    file beside the records: do not put a key here."""

    def __post_init__(self) -> None:
        require(bool(self.urls), "urls=[]", "name at least one, as in [http://HOST:30000]")
        split_urls(self.urls)
        require(bool(self.model.strip()), f"model={self.model!r}", "must not be empty")
        require_positive(self, "max_tokens", "samples", "keep", "max_in_flight", "request_deadline_s")
        require_not_negative(self, "temperature", "retries", "price_in", "price_out")
        require(self.samples <= MAX_SAMPLES, f"samples={self.samples}", f"must be at most {MAX_SAMPLES}")
        most = min(self.samples, MAX_KEPT)
        require(self.keep <= most, f"keep={self.keep}", f"must be at most {most}: samples={self.samples}")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}", "must be above 0 and at most 1")
        require(self.top_k == -1 or self.top_k > 0, f"top_k={self.top_k}", "must be positive, or -1 for all tokens")
        require(
            self.request_deadline_s <= MAX_DEADLINE_S,
            f"request_deadline_s={self.request_deadline_s}",
            f"must be at most {MAX_DEADLINE_S:g}",
        )
        if self.requests_per_s is not None:
            require_positive(self, "requests_per_s")
        # The message must not show the value: it may be a key that was written here by mistake.
        is_name = self.api_key_env is None or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) is not None
        require(is_name, "api_key_env", "must be the name of an environment variable: letters, digits and _")


@dataclass(frozen=True, kw_only=True)
class TraceCommandConfig:
    """The file of ``tools/generate_traces.py --teachers``."""

    teachers: Mapping[str, TeacherConfig] = field(default_factory=dict)
    """Name of the teacher, which is also its name in ``traces`` → the teacher."""
    seed: int = 1
    """Seed of the responses."""
    shared_files: bool = False
    """Give the files that the command writes the modes that the umask says. ``false``: only this user can read them."""
    data: DataConfig = field(default_factory=DataConfig)
    """Columns of the prompt file (``format``, ``fields``)."""
    grading: GradingConfig = field(default_factory=GradingConfig)
    """Verifiers of the traces."""

    def __post_init__(self) -> None:
        require_sound_values(self)
        require(0 <= self.seed < _MAX_SEED, f"seed={self.seed}", "must be in [0, 2^31)")
        require(bool(self.teachers), "teachers={}", "name at least one, as in {qwen: {urls: [http://HOST:30000], …}}")
        require(not self.data.prompts, f"data.prompts={list(self.data.prompts)}", "the command line names the file")
        for name in self.teachers:
            require(
                bool(name.strip()) and name not in (".", "..") and len(name.encode(errors="replace")) <= _MAX_NAME,
                f"teachers: a teacher named {name!r}",
                f"a name is a part of a file's: at most {_MAX_NAME} bytes, not blank, neither . nor ..",
            )
            require("#" not in name, f"teachers: a teacher named {name!r}", "must not have a #, which numbers traces")
