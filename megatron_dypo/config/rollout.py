"""The section ``rollout`` of the configuration tree: sampling, and the SGLang servers that do it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.server_flags import require_free_flags
from megatron_dypo.config.urls import require_host, require_urls
from megatron_dypo.config.words import counted

_MAX_PORT = 65535
MAX_DEADLINE_S = 1e8
"""Longest deadline: three years. Deadlines become time-outs of libraries, which overflow somewhere above."""


@dataclass(frozen=True, kw_only=True)
class ServersConfig:
    """The SGLang servers: running ones given by URL, or servers that the run starts and stops."""

    urls: tuple[str, ...] = ()
    """Servers that run already, as ``http://HOST:PORT``. Empty: the run starts ``per_node`` servers on its own node."""
    urls_are_restarted: bool = False
    """Set this if something starts the servers of ``urls`` again when they die, as ``megatron-dypo serve`` does. A
    refit that finds no server then waits for one until its deadline."""
    router: str | None = None
    """URL of a router in front of ``urls`` (sglang-router, as ``megatron-dypo route`` runs it). Requests go to the
    router, refits to each server. The trainer tells the router which servers hold the newest weights."""
    tensor_parallel: int = 1
    """GPUs of each server over which the model is split (SGLang's ``--tp-size``)."""
    python: str | None = None
    """Python interpreter that has SGLang. ``null``: the trainer's own."""
    host: str = "127.0.0.1"
    """Address at which the run's servers listen and are reached. On several nodes, this node's address."""
    port: int = 30000
    """First port to try. The servers of a node take the next free ports. Choose it below the system's ephemeral
    range."""
    base_gpu: int | None = None
    """First GPU of the servers on their node. Each server takes the next ``tensor_parallel`` GPUs. ``null``: for
    servers that the run starts, the first GPU after those of the ranks on the same node, or 0 with
    ``refit.offload_servers``, where they share GPUs; for ``megatron-dypo serve``, 0."""
    mem_fraction: float | None = None
    """Share of GPU memory for weights and KV cache (SGLang's ``--mem-fraction-static``). ``null``: SGLang's default."""
    max_total_tokens: int | None = None
    """Size of the KV cache in tokens (SGLang's ``--max-total-tokens``). ``null``: on a GPU, SGLang's choice; on a CPU,
    20,000."""
    extra_args: tuple[str, ...] = ()
    """More arguments for ``sglang.launch_server``. Flags that other keys set are refused, those that show a secret or
    open a socket without a key, and those of servers that no refit serves: a weight cache, a draft model. Servers with
    moving or redundant experts need ``refit.transport`` ``auto``, ``broadcast`` or ``disk``. Attention data parallelism
    (``--attn-dp-size``) is planned for, except for ``llama``, ``mistral`` and ``qwen2``, which SGLang cannot serve with
    it (docs/gpu.md)."""
    api_key_env: str = "DYPO_SGLANG_API_KEY"
    """Name of the environment variable with the servers' API key. If it is unset, servers that the run starts get a
    random key."""
    start_deadline_s: float = 600.0
    """Seconds within which all servers must be ready after the first start. The host of a given URL must answer within
    a minute, if only by refusing a connection."""
    stop_grace_s: float = 20.0
    """Seconds that a server gets to end on its own before it is killed."""
    max_restarts: int = 3
    """How often in a row the run starts a server of its own again after it died, counted per server; half an hour of
    serving ends a row. After that the server is left out; with no server left the run ends. 0: the first server that
    dies ends the run. A server that dies before it has served is started again only if the run has a checkpoint; in a
    new run it ends the start."""
    per_node: int = 1
    """Servers on one node: those that the run starts, or that ``megatron-dypo serve`` starts on each rollout node."""
    nodes: int = 1
    """Number of rollout nodes. Without ``urls`` there are ``nodes`` × ``per_node`` servers; a server that needs more
    GPUs than a node has spans several nodes. Above 1 the servers are not started by the run but by the scripts in
    ``slurm/``."""

    def __post_init__(self) -> None:
        require_positive(self, "per_node", "nodes", "tensor_parallel")
        _require_deadlines(self, "start_deadline_s", "stop_grace_s")
        require_not_negative(self, "max_restarts")
        if self.base_gpu is not None:
            require_not_negative(self, "base_gpu")
        require_urls(self.urls, "urls")
        require_host(self.host, "host")
        last = self.port + self.per_node - 1
        require(
            self.port >= 1 and last <= _MAX_PORT,
            f"port={self.port}",
            f"must be from 1 to {_MAX_PORT - self.per_node + 1}: each of {counted(self.per_node, 'server')} "
            "takes a port",
        )
        if self.mem_fraction is not None:
            require(0 < self.mem_fraction < 1, f"mem_fraction={self.mem_fraction}", "must be between 0 and 1")
        if self.max_total_tokens is not None:
            require_positive(self, "max_total_tokens")
        require(self.python is None or bool(self.python.strip()), f"python={self.python!r}", "must be a path, or null")
        is_name = bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env))
        # A key that was written here by mistake must not be shown.
        require(is_name, "api_key_env", "must be the name of an environment variable: letters, digits and _")
        require_free_flags(self.extra_args)
        require(
            not self.urls_are_restarted or bool(self.urls),
            "urls_are_restarted=true",
            "needs urls: it says that those servers are restarted",
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


def _require_deadlines(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        rule = f"must be above 0 and at most {MAX_DEADLINE_S:g} seconds"
        require(0 < value <= MAX_DEADLINE_S, f"{name}={value}", rule)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How groups of responses are sampled."""

    group_size: int = 8
    """k: responses sampled for each prompt (paper: 8)."""
    mode: Literal["sync", "async"] = "sync"
    """``sync``: collect a rollout batch, then learn from it. ``async``: collect the next rollout batch while
    learning from this one. Its samples are then one batch older than the weights, and a response may begin before a
    refit and end after it; ``objective.importance`` corrects for both."""
    oversample: float = 1.0
    """Groups in flight for each group that the rollout batch still lacks. Above 1, or with ``mode: async``,
    collection ends as soon as the queues hold a rollout batch, so that no slow group holds up the step; short
    responses come first. A synchronous run aborts the groups still in flight and draws their prompts first for the
    next batch."""
    prompts_per_round: int = 128
    """Prompts drawn in one round of collection, over all data-parallel ranks."""
    max_new_tokens: int = 8192
    """Longest response (paper: 8,192)."""
    temperature: float = 1.0
    """Sampling temperature of training rollouts. The objective uses the log-probs at temperature 1."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability. 1: from all."""
    top_k: int = -1
    """Sample from this many of the likeliest tokens. -1: from all."""
    max_in_flight: int = 256
    """Most open requests of one data-parallel rank."""
    request_deadline_s: float = 1800.0
    """Give up a request after this many seconds, and try it again."""
    retries: int = 3
    """Further attempts after the first one, for a request and for a group that stays incomplete."""
    journal: bool = True
    """Write each finished group into ``<run.dir>/journal``, so that a run that resumes samples only the groups that
    were in flight, and not again all since the checkpoint. It uses a group only for weights that are bit for bit those
    that sampled it."""
    journal_mib: int = 4096
    """Largest journal of one data-parallel rank in MiB. It begins anew at each checkpoint; above this size groups are
    no longer added to it."""
    servers: ServersConfig = field(default_factory=ServersConfig)
    stop_token_ids: tuple[int, ...] = ()
    """More token ids that end a response. These always do: the end of a turn in the chat template, ``eos_token``, and
    ``eos_token_id`` of the model's configuration."""

    @property
    def uses_stream(self) -> bool:
        """Whether groups come from a stream in the background, each at a time of its own."""
        return self.mode == "async" or self.oversample > 1

    def __post_init__(self) -> None:
        require(
            all(token_id >= 0 for token_id in self.stop_token_ids),
            f"stop_token_ids={list(self.stop_token_ids)}",
            "token ids are not negative",
        )
        require(self.group_size >= 2, f"group_size={self.group_size}", "a group needs at least 2 rollouts")
        is_factor = 1 <= self.oversample < math.inf
        require(is_factor, f"oversample={self.oversample}", "must be at least 1, and finite")
        require_positive(self, "prompts_per_round", "max_new_tokens", "max_in_flight", "journal_mib")
        require(0 < self.temperature < math.inf, f"temperature={self.temperature}", "must be positive and finite")
        _require_deadlines(self, "request_deadline_s")
        require(self.top_k == -1 or self.top_k >= 1, f"top_k={self.top_k}", "must be at least 1, or -1 for all tokens")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}", "must be in (0, 1]")
        require_not_negative(self, "retries")
