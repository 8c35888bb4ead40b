"""The servers' part of the configuration tree: rollouts; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.urls import require_host, require_urls

_MAX_PORT = 65535
MAX_DEADLINE_S = 1e8
"""Three years. Deadlines become time-outs of libraries, which overflow somewhere above."""
_OWN_FLAGS = {
    "--model-path": "model.hf_path",
    "--model": "model.hf_path",
    "--dtype": "model.dtype",
    "--random-seed": "run.seed",
    "--host": "rollout.servers.host",
    "--port": "rollout.servers.port",
    "--tp-size": "rollout.servers.tensor_parallel",
    "--tensor-parallel-size": "rollout.servers.tensor_parallel",
    "--base-gpu-id": "rollout.servers.base_gpu",
    "--mem-fraction-static": "rollout.servers.mem_fraction",
    "--max-total-tokens": "rollout.servers.max_total_tokens",
    "--api-key": "the environment variable that rollout.servers.api_key_env names",
    "--config": None,
    "--skip-tokenizer-init": None,
    "--custom-weight-loader": None,
    "--weight-version": None,
}
"""Flags of SGLang that a run sets itself → the key to use in their place; None: there is none."""


@dataclass(frozen=True, kw_only=True)
class ServersConfig:
    """The SGLang servers: given by URL, or started and stopped by the run."""

    urls: tuple[str, ...] = ()
    """Servers that run already, as ``http://HOST:PORT``; empty: the run starts ``per_node`` of them on its own node."""
    urls_are_restarted: bool = False
    """Somebody starts servers of ``urls`` again when they die, as ``megatron-dypo serve`` does: with none left, a push waits
    for one until ``refit.deadline_s``."""
    router: str | None = None
    """A router (sglang-router, as ``megatron-dypo route`` runs it) in front of ``urls``: requests go to it, pushes of weights
    still to each server. The trainer tells it which of them hold the weights of the last push."""
    tensor_parallel: int = 1
    """SGLang's ``--tp-size`` of each server."""
    python: str | None = None
    """Interpreter that has SGLang; None: the trainer's own."""
    host: str = "127.0.0.1"
    """Address that servers of the run bind to and are reached at; on several nodes, this node's address."""
    port: int = 30000
    """First port to try, below the ephemeral range; a node's servers take the next free ones."""
    base_gpu: int = 0
    """First GPU of the servers of the run; each takes the next ``tensor_parallel`` ones."""
    mem_fraction: float | None = None
    """SGLang's ``--mem-fraction-static``, between 0 and 1."""
    max_total_tokens: int | None = None
    """SGLang's ``--max-total-tokens`` (size of the KV cache); on a CPU it is needed and defaults to 20,000."""
    extra_args: tuple[str, ...] = ()
    """More arguments for ``sglang.launch_server``, but for those that other keys set."""
    api_key_env: str = "DYPO_SGLANG_API_KEY"
    """Environment variable that holds the API key; servers that the run starts get a random key if it is unset."""
    start_deadline_s: float = 600.0
    stop_grace_s: float = 20.0
    """Time that a server of the run gets to end on its own before it is killed."""
    max_restarts: int = 3
    """Times that a server which the run started is started again after it died, each server on its own; after that it is
    left out, and the run ends when none is left. 0: a server that dies ends the run."""
    per_node: int = 1
    """Servers that one node runs: those that the run itself starts, or ``megatron-dypo serve`` on each rollout node."""
    nodes: int = 1
    """Rollout nodes. Without ``urls`` the servers are ``nodes`` × ``per_node``; a server that needs more GPUs than a node
    has spans several of them. Above 1, something else than the run starts them: the scripts in ``slurm/`` set it."""

    def __post_init__(self) -> None:
        require_positive(self, "per_node", "nodes", "tensor_parallel")
        _require_deadlines(self, "start_deadline_s", "stop_grace_s")
        require_not_negative(self, "max_restarts", "base_gpu")
        require_urls(self.urls, "urls")
        require_host(self.host, "host")
        last = self.port + self.per_node - 1
        require(
            self.port >= 1 and last <= _MAX_PORT,
            f"port={self.port}",
            f"must be from 1 to {_MAX_PORT - self.per_node + 1}: {self.per_node} servers take a port each",
        )
        if self.mem_fraction is not None:
            require(0 < self.mem_fraction < 1, f"mem_fraction={self.mem_fraction}", "must be between 0 and 1")
        if self.max_total_tokens is not None:
            require_positive(self, "max_total_tokens")
        require(self.python is None or bool(self.python.strip()), f"python={self.python!r}", "must be a path, or null")
        is_name = bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env))
        # A key that was written here by mistake must not be shown.
        require(is_name, "api_key_env", "must be the name of an environment variable: letters, digits and _")
        _require_free_flags(self.extra_args)
        require(
            not self.urls_are_restarted or bool(self.urls), "urls_are_restarted=true", "needs urls: it is said of those"
        )
        require(self.router is None or bool(self.urls), f"router={self.router!r}", "needs urls: the servers behind it")
        if self.router is not None:
            require_urls((self.router,), "router")
            require_urls((*self.urls, self.router), "router")

    def num_servers(self, gpus_per_node: int) -> int:
        """Return the number of servers of the run: those of ``urls``, or ``nodes`` × ``per_node``.

        A server of more than ``gpus_per_node`` GPUs takes several nodes.
        """
        if self.urls:
            return len(self.urls)
        span = -(-self.tensor_parallel // gpus_per_node)
        return (self.nodes // span if self.nodes % span == 0 else self.nodes) * self.per_node


def _require_free_flags(extra_args: tuple[str, ...]) -> None:
    """Require SGLang's arguments to repeat no flag that the run sets; argparse takes beginnings of flags as well."""
    for argument in extra_args:
        flag = argument.split("=", 1)[0].strip().split(" ", 1)[0]
        own = [name for name in _OWN_FLAGS if name == flag or (len(flag) > 2 and name.startswith(flag))]
        if flag.startswith("--") and own:
            key = _OWN_FLAGS[own[0]]
            advice = f"use {key} instead" if key else "leave it out, the run sets it itself"
            raise ValueError(f"extra_args={flag!r}: {advice}")


def _require_deadlines(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        rule = f"must be above 0 and at most {MAX_DEADLINE_S:g} seconds"
        require(0 < value <= MAX_DEADLINE_S, f"{name}={value}", rule)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How groups are sampled."""

    group_size: int = 8
    """k (paper: 8)."""
    mode: Literal["sync", "async"] = "sync"
    """``sync``: collect, then learn. ``async``: the next rollout batch is collected while this one is learnt from, so
    that it is one batch older than the weights that learn from it, and its rollouts may span a push
    (``refit.in_flight``); ``objective.importance`` corrects for both."""
    oversample: float = 1.0
    """Groups kept in flight for each group that the rollout batch still lacks. Above 1, or with ``mode: async``,
    collection ends when the queues hold a rollout batch, not with the last group: a slow group holds nobody up, and
    short responses come first. What a synchronous run then aborts is the first to be drawn in the next batch."""
    prompts_per_round: int = 128
    """Prompts drawn for one round of collection, over all data-parallel ranks."""
    max_new_tokens: int = 8192
    """Response limit (paper: 8,192)."""
    temperature: float = 1.0
    """Sampling temperature of training rollouts. Log-probs in the objective are those of temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    """Tokens to sample from; -1: all."""
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
        is_factor = 1 <= self.oversample < math.inf
        require(is_factor, f"oversample={self.oversample}", "must be at least 1, and finite")
        require_positive(self, "prompts_per_round", "max_new_tokens", "max_in_flight")
        require(0 < self.temperature < math.inf, f"temperature={self.temperature}", "must be positive and finite")
        _require_deadlines(self, "request_deadline_s")
        require(self.top_k == -1 or self.top_k >= 1, f"top_k={self.top_k}", "must be at least 1, or -1 for all tokens")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}", "must be in (0, 1]")
        require_not_negative(self, "retries")
