"""How a run connects to its servers. They start while the model is built; then every rank learns their addresses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.loop.journal.weights import NoWeights, Weights
from megatron_dypo.loop.replica import Follower
from megatron_dypo.loop.requests import FollowerRequests, LeaderRequests
from megatron_dypo.loop.servers import NoRouter, Servers
from megatron_dypo.loop.setup.background import open_stream
from megatron_dypo.loop.setup.foundation import Foundation
from megatron_dypo.loop.setup.open_journal import open_journal, open_weights
from megatron_dypo.loop.setup.open_leader import OpenedLeader
from megatron_dypo.loop.setup.teachers import judged_trace_text
from megatron_dypo.mcore.chunks import named_global_weights
from megatron_dypo.mcore.fp8 import values
from megatron_dypo.mcore.routing_replay import route_shape
from megatron_dypo.parallel import device
from megatron_dypo.processes.stalls import warn
from megatron_dypo.processes.stop_requests import STOP
from megatron_dypo.processes.watchdog import mark
from megatron_dypo.refit.quantized_servers import refusal
from megatron_dypo.refit.refitter import Refitter
from megatron_dypo.refit.servers import Watch
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.router import Router
from megatron_dypo.rollout.server.node import watching
from megatron_dypo.rollout.server.servers import ServerPool, start_servers
from megatron_dypo.types import Tokens

log = logging.getLogger("megatron_dypo")
_SIGN_OF_LIFE_S = 1.0


def start_in_background(
    config: Config, stack: contextlib.ExitStack, *, have_worked: bool = False
) -> Future[ServerPool]:
    """Start or reach the servers in a thread. Closing ``stack`` stops them.

    Args:
        have_worked: as for :func:`~megatron_dypo.rollout.server.servers.start_servers`.

    Raises:
        ValueError: this node's GPUs are too few, or its servers could not be refitted.
    """
    quantize = config.refit.quantize
    if problem := refusal(quantize, device.device_kind(), device.compute_capability()):
        raise ValueError(f"refit.quantize={quantize}: {problem}")
    servers = dataclasses.replace(config.servers, base_gpu=first_gpu(config))
    executor = stack.enter_context(ThreadPoolExecutor(max_workers=1))
    log.info("starting or reaching SGLang servers")
    future = executor.submit(
        start_servers,
        servers,
        Path(config.model.hf_path),
        config.model.dtype,
        Path(config.run.dir) / "logs",
        seed=config.run.seed,
        device=device.device_kind(),
        temperature=config.rollout.temperature,
        returns_routes=config.objective.replay == "rollout",
        have_worked=have_worked,
    )
    stack.callback(lambda: future.result().stop() if future.exception() is None else None)
    return future


def await_servers(starting: Future[ServerPool] | None) -> ServerPool | None:
    """Return the servers when they have started. Until then the watchdog is told that this rank is alive: servers have
    a deadline of their own, ``rollout.servers.start_deadline_s``.

    Raises:
        ServerDiedError, NotHealthyError, ValueError: as :func:`~megatron_dypo.rollout.server.servers.start_servers`.
    """
    if starting is None:
        return None
    while not starting.done():
        mark("waiting for the servers")
        wait([starting], timeout=_SIGN_OF_LIFE_S)
    return starting.result()


def first_gpu(config: Config) -> int:
    """Return the first GPU of the servers that a run starts on this node.

    Raises:
        ValueError: the node has fewer GPUs than ranks and servers need.
    """
    servers = config.rollout.servers
    ranks = 0 if config.refit.offload_servers else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = ranks if servers.base_gpu is None else servers.base_gpu
    last, seen = first + servers.per_node * servers.tensor_parallel, device.num_gpus()
    if not servers.urls and device.on_gpu() and last > seen:
        raise ValueError(
            f"rollout.servers: per_node={servers.per_node}, tensor_parallel={servers.tensor_parallel} and base_gpu="
            f"{first} need {last} GPUs, this node has {seen}; set base_gpu=0 for servers that share the ranks' GPUs"
        )
    return first


def connect(
    base: Foundation, opened: OpenedLeader | Follower, pool: ServerPool | None, *, keeps_journal: bool = True
) -> Servers:
    """Return the connected servers of a run; only the global leader has the ``pool``. Collective over the world.

    Args:
        keeps_journal: whether finished groups are written down, if the config asks for it.
    """
    config, ranks, policy = base.config, base.ranks, base.policy
    urls, api_key, honour_seeds = ranks.of_leaders(
        (pool.urls, pool.api_key, pool.honours_seeds()) if pool else ((), None, False)
    )[0]
    requests: LeaderRequests | FollowerRequests = FollowerRequests()
    weights = open_weights(config, policy, base.restored) if keeps_journal else NoWeights()
    if isinstance(opened, OpenedLeader):
        run_seed = config.run.seed if honour_seeds else None
        requests = _requests(base, opened, urls, api_key, pool, weights, run_seed)
        base.stack.callback(requests.journal.close)
        base.stack.callback(requests.stream.stop)
    router = config.rollout.servers.router if ranks.is_global_leader else None
    refitter = Refitter(
        policy.layout,
        policy.arch,
        lambda: named_global_weights(policy.chunks),
        urls=urls,
        api_key=api_key,
        config=config.refit,
        run_dir=base.run_dir,
        hf_reference=Path(config.model.hf_path),
        watch=Watch(take_lost=pool.take_lost, may_return=pool.may_return, is_stopping=STOP.is_set) if pool else None,
        values=values,
        whole=policy.whole_weights(),
    )
    base.stack.enter_context(contextlib.closing(refitter))
    if pool is not None:
        watched, say = [*urls, *filter(None, [router])], functools.partial(warn, base.run_dir)
        base.stack.enter_context(watching(pool, watched, say, config.run.watchdog_s))
    return Servers(
        refitter=refitter,
        requests=requests,
        router=Router(router, api_key) if router else NoRouter(),
        ranks=ranks,
        tally=base.tally,
        timings=base.timings,
        weights=weights,
    )


def _requests(
    base: Foundation,
    opened: OpenedLeader,
    urls: tuple[str, ...],
    api_key: str | None,
    pool: ServerPool | None,
    weights: Weights | NoWeights,
    run_seed: int | None,
) -> LeaderRequests:
    """Return a client and a rollout stream for the same servers. ``run_seed``: only if they honour seeds."""
    config, tokenizer, progress = base.config, opened.tokenizer, base.progress

    def decode(tokens: Tokens) -> str:
        return tokenizer.decode(tokens.tolist())

    make_client = functools.partial(
        SGLangClient,
        urls,
        api_key,
        cfg=config.rollout,
        decode=decode,
        stop_token_ids=tokenizer.eos_ids,
        check=pool.check if pool else None,
        router=config.rollout.servers.router,
        vocab_size=base.policy.arch.vocab_size,
        routes=route_shape(base.policy.arch) if config.objective.replay == "rollout" else None,
        run_seed=run_seed,
    )
    trace_text = judged_trace_text(base.objective, decode, config.run.seed)
    journal = open_journal(config, base.ranks, weights, decode, opened.leader.inputs)
    stream = open_stream(
        make_client(),
        opened.leader.draws,
        opened.verifier,
        base.objective,
        config,
        current_step=lambda: progress.step,
        trace_text=trace_text,
        journal=journal,
    )
    return LeaderRequests(
        client=make_client(),
        stream=stream,
        verifier=opened.verifier,
        fail_truncated=config.grading.fail_truncated,
        trace_text=trace_text,
        show_progress=base.ranks.is_global_leader,
        journal=journal,
    )
