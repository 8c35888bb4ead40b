"""The servers' part of the configuration tree: rollouts; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.config.rules import require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class ServersConfig:
    """The SGLang servers: given by URL, or started and stopped by the run."""

    urls: tuple[str, ...] = ()
    """Servers that run already; empty: start ``count`` of them."""
    urls_come_back: bool = False
    """Somebody starts servers of ``urls`` again when they die, as ``megatron-dypo serve`` does: with none left, a push waits
    for one until ``weights.deadline_s``."""
    router: str | None = None
    """A router (sglang-router, as ``megatron-dypo route`` runs it) in front of ``urls``: requests go to it, pushes of weights
    still to each server. The trainer tells it which of them hold the weights of the last push."""
    count: int = 1
    tensor_parallel: int = 1
    """SGLang's ``--tp-size`` of each server."""
    python: str | None = None
    """Interpreter that has SGLang; None: the trainer's own."""
    host: str = "127.0.0.1"
    """Address that servers of the run bind to and are reached at; on several nodes, this node's address."""
    port: int = 30000
    """First port to try, below the ephemeral range."""
    base_gpu: int = 0
    """First GPU of the servers of the run; each takes the next ``tensor_parallel`` ones."""
    mem_fraction: float | None = None
    """SGLang's ``--mem-fraction-static``."""
    max_total_tokens: int | None = None
    """SGLang's ``--max-total-tokens`` (size of the KV cache); on a CPU it is needed and defaults to 20,000."""
    extra_args: tuple[str, ...] = ()
    """More arguments for ``sglang.launch_server``."""
    api_key_env: str = "DYPO_SGLANG_API_KEY"
    """Environment variable that holds the API key; servers that the run starts get a random key if it is unset."""
    start_deadline_s: float = 600.0
    stop_grace_s: float = 20.0
    """Time that a server of the run gets to end by itself before it is killed."""
    restarts: int = 3
    """Times that a server which the run started is started again after it died, each server by itself; after that it is
    left out, and the run ends when none is left. 0: a server that dies ends the run."""

    def __post_init__(self) -> None:
        require_positive(self, "count", "tensor_parallel", "port", "start_deadline_s", "stop_grace_s")
        require_not_negative(self, "restarts")
        require(not self.urls_come_back or bool(self.urls), "urls_come_back=true", "needs urls: it is said of those")
        require(self.router is None or bool(self.urls), f"router={self.router!r}", "needs urls: the servers behind it")
        require_not_negative(self, "base_gpu")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How groups are sampled."""

    group_size: int = 8
    """k (paper: 8)."""
    mode: Literal["sync", "async"] = "sync"
    """``sync``: collect, then learn. ``async``: the next rollout batch is collected while this one is learnt from, so
    that it is one batch older than the weights that learn from it, and its rollouts may span a push
    (``weights.in_flight``); ``objective.importance`` corrects for both."""
    oversample: float = 1.0
    """Groups kept in flight for each group that the rollout batch still lacks. Above 1, or with ``mode: async``,
    collection ends when the queues hold a rollout batch, not with the last group: a slow group holds nobody up, and
    short responses come first. What a synchronous run then aborts is the first to be drawn in the next batch."""
    prompts_per_step: int = 128
    """Prompts drawn for one round of collection, over all data-parallel ranks."""
    max_new_tokens: int = 8192
    """Response limit (paper: 8,192)."""
    temperature: float = 1.0
    """Sampling temperature of training rollouts. Log-probs in the objective are those of temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    max_in_flight: int = 256
    """Requests that one data-parallel rank keeps open at once."""
    request_deadline_s: float = 1800.0
    retries: int = 3
    """Attempts after the first for a request, and for a group that stays incomplete."""
    servers: ServersConfig = field(default_factory=ServersConfig)
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides those of the tokenizer: the end of a turn, which its chat template tells,
    ``eos_token``, and ``eos_token_id`` of the model's configuration."""

    def __post_init__(self) -> None:
        require(
            all(token_id >= 0 for token_id in self.stop_token_ids),
            f"stop_token_ids={list(self.stop_token_ids)}",
            "token ids are not negative",
        )
        require(self.group_size >= 2, f"group_size={self.group_size}", "a group needs at least 2 rollouts")
        require(self.oversample >= 1, f"oversample={self.oversample}", "must be at least 1")
        require_positive(
            self, "prompts_per_step", "max_new_tokens", "max_in_flight", "request_deadline_s", "temperature"
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p}", "must be in (0, 1]")
        require_not_negative(self, "retries")
