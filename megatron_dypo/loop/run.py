"""Everything that a run holds while it lasts: built by :func:`open_run`, closed in reverse order."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from safetensors import SafetensorError

from megatron_dypo.batching.exchange import broadcast_object, gather_objects
from megatron_dypo.batching.queues import Queues, dump_samples, load_samples
from megatron_dypo.config.load import changed_lines, dump_config
from megatron_dypo.config.tree import Config
from megatron_dypo.data.prompts import DropCounts, PromptStream
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.fs import replace_file
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.loop.ledger import Ledger
from megatron_dypo.loop.open_data import (
    check_against_verifier,
    data_identity,
    judge_traces,
    open_dataset,
    open_held_out,
    open_tokenizer,
    require_same_data,
)
from megatron_dypo.loop.outcomes import Outcomes
from megatron_dypo.loop.tally import Tally
from megatron_dypo.mcore import features
from megatron_dypo.mcore.checkpoints import checkpoint, folder
from megatron_dypo.mcore.fp8 import named_values
from megatron_dypo.mcore.model import build_model, load_initial_weights
from megatron_dypo.mcore.optimizer import PolicyOptimizer, build_optimizer
from megatron_dypo.mcore.reference import ReferencePolicy
from megatron_dypo.metrics.samples import SampleLog, discard_samples
from megatron_dypo.metrics.versions import write_versions
from megatron_dypo.metrics.writer import MetricsWriter, Timings
from megatron_dypo.models.architecture import Architecture, load_architecture
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.parallel.device import compute_capability, device_kind, memory_bytes
from megatron_dypo.parallel.layout import Layout, close, init_layout
from megatron_dypo.planning.fit import check_memory
from megatron_dypo.refit.refitter import Refitter
from megatron_dypo.refit.servers import Watch
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.router import Router
from megatron_dypo.rollout.server.servers import ServerPool, start_servers
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.types import DropReason, GradedGroup, Prompt

log = logging.getLogger("megatron_dypo")

_STATE_KEYS = {"cursor", "unfinished", "ledger", "batches", "is_mid_batch", "data"}
"""What resuming reads of the trainer's state in a checkpoint (:func:`save_checkpoint`)."""


@dataclass(kw_only=True)
class Leader:
    """What only the first rank of a replica holds."""

    group: dist.ProcessGroup
    """CPU group of all leaders."""
    tokenizer: Tokenizer
    stream: PromptStream
    held_out: dict[str, PromptStream]
    """Name of an evaluation set → its prompts."""
    client: SGLangClient | None
    """None when the run never asks a server."""
    verifier: Verifier | None
    sample_log: SampleLog
    queues: Queues = field(default_factory=Queues)
    ledger: Ledger = field(default_factory=Ledger)
    """What became of this replica's draws; on the global leader, of all draws before a resume too."""
    outcomes: Outcomes = field(default_factory=Outcomes)
    """Of the collection under way."""
    cursor: int = 0
    """Position of the next draw from ``stream``; replicas that collect in the background are not in step."""
    drops: deque[DropCounts] = field(default_factory=deque)
    """What draws left out, until it is counted."""
    unfinished: list[Prompt] = field(default_factory=list)
    """Drawn by the run that this one resumes, and to be drawn again first."""
    background_client: SGLangClient | None = None
    """For ``background`` alone, which runs while ``client`` evaluates."""
    background: RolloutStream[GradedGroup] | None = None

    def long_prompts(self) -> Ledger:
        """The prompts of ``drops``, which are in no other account yet."""
        return Ledger(dropped=Counter({DropReason.TOO_LONG: sum(drops.prompts for drops in self.drops)}))


@dataclass(kw_only=True)
class Run:
    """One rank's view of a run."""

    config: Config
    layout: Layout
    arch: Architecture
    chunks: Sequence[Any]
    optimizer: PolicyOptimizer
    objective: Objective
    reference: ReferencePolicy | None
    """None when the objective reads no reference, or takes π_old for it."""
    leader: Leader | None
    bridge: Refitter | None
    router: Router | None
    """On the global leader, if the servers have one."""
    writer: MetricsWriter | None
    """On the global leader."""
    step: int = 0
    """Optimizer steps done; also the version of the weights."""
    batches: int = 0
    """Rollout batches opened."""
    served_version: int = 0
    """Of the last push."""
    pushed: tuple[int, ...] = ()
    """Versions of the last push and of the last one before it that was of another version, ascending: what servers may
    hold while a push is under way."""
    is_mid_batch: bool = False
    """The open rollout batch has updates left: nothing is collected and nothing pushed before they are made."""
    bad_steps: int = 0
    """Updates in a row that were skipped because their gradients were not finite."""
    last_problem: str = ""
    """Of the last update that was skipped."""
    timings: Timings = field(default_factory=Timings)
    tally: Tally = field(default_factory=Tally)

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)


def uses_servers(config: Config, objective: Objective, first_step: int) -> bool:
    """Whether any step that is left, or any evaluation, asks a server."""
    steps_left = range(first_step, config.run.steps)
    return bool(steps_left) and (bool(config.eval.prompts) or any(map(objective.needs_rollouts, steps_left)))


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Build a run: layout, servers, model, optimizer, last checkpoint, data, bridge. Collective over the world.

    Raises:
        ValueError: the run folder holds a checkpoint and ``run.resume`` is false; the policy does not fit into the
            GPUs (``run.check_memory``); the machine cannot run ``model.fp8.recipe``; or any input breaks a rule.
    """
    objective = build_objective(config.objective)
    with contextlib.ExitStack() as stack:
        # A rank may wait in a collective for as long as the rollouts take; a dead peer is noticed by its socket.
        patience = 2 * config.rollout.request_deadline_s * config.batching.max_collect_rounds
        layout = init_layout(config.parallel, timeout_s=max(patience, 1800.0), seed=config.run.seed)
        stack.callback(close, layout)
        features.require_fp8(config.model.fp8, features.probe())
        memory, capability = memory_bytes(), compute_capability()
        if config.run.check_memory and memory is not None and capability is not None:
            fused, size = features.probe().transformer_engine, layout.world_size
            check_memory(config, trainer_gpus=size, memory=memory, capability=capability, fused=fused)
        latest = _prepare_folder(config, layout)
        with_servers = uses_servers(config, objective, checkpoint.step_of(latest) if latest else 0)
        starting = _start_servers(config, stack) if with_servers and layout.is_global_leader else None
        run = _build_policy(config, layout, objective)
        restored = _restore(run, latest) if latest else None
        run.leader = _build_leader(run, restored, stack, with_servers=with_servers)
        pool = starting.result() if starting else None
        urls, api_key = _share_servers(layout, pool)
        if urls:
            _connect(run, urls, api_key, pool, stack)
        if layout.is_global_leader:
            _write_config(config)  # the first run's stays where a resume is refused: nothing was done with another
            run.writer = stack.enter_context(
                MetricsWriter(
                    run.dir,
                    config.logging,
                    resume_step=run.step + bool(latest),
                    config=yaml.safe_load(dump_config(config)),
                )
            )
        yield run


def save_checkpoint(run: Run) -> Path:
    """Write everything that resuming needs. Collective over the world."""
    leader, refreshed = run.leader, run.config.objective.reference.mode == "refreshed"
    kept = [s for g in (*leader.queues.batch, *leader.queues.groups()) for s in g] if leader else []
    return checkpoint.save(
        run.dir / "checkpoints",
        run.step,
        chunks=run.chunks,
        optimizer=run.optimizer,
        layout=run.layout,
        trainer_state={
            **(_drawn(leader, run.layout) if leader else {}),
            "batches": run.batches,
            "is_mid_batch": run.is_mid_batch,
            "data": data_identity(run.config, leader.stream) if leader else {},
        },
        leader_state=dump_samples(kept),
        reference=run.reference if refreshed else None,
        hf_path=run.config.model.hf_path,
        keep=run.config.checkpoint.keep,
    )


def _drawn(leader: Leader, layout: Layout) -> dict[str, Any]:
    """Where the next draw of the run is, and which draws before it came to nothing yet. Collective over the leaders."""
    stream = leader.background
    with stream.still() if stream else contextlib.nullcontext():
        unfinished = [prompt.order for prompt in leader.unfinished] + (stream.unfinished() if stream else [])
        cursor, ledger = leader.cursor, leader.ledger + leader.long_prompts()
    by_leader = gather_objects((cursor, unfinished, ledger), leader.group)
    end = max(cursor for cursor, _, _ in by_leader)
    ledger = sum((ledger for _, _, ledger in by_leader), Ledger())
    for rank, (cursor, orders, _) in enumerate(by_leader):
        # Draws that a replica is behind with are in flight for the run that resumes.
        behind = range(cursor + (rank - cursor) % layout.data, end, layout.data)
        ledger.draw(len(behind))
        orders += behind
    unfinished = sorted(order for _, orders, _ in by_leader for order in orders)
    return {"cursor": end, "unfinished": unfinished, "ledger": ledger.as_json()}


def _prepare_folder(config: Config, layout: Layout) -> Path | None:
    """Make the run folder; the checkpoint to resume from, if it holds one."""
    folder = Path(config.run.dir)
    found = checkpoint.find_latest(folder / "checkpoints")
    if found and not config.run.resume:
        raise ValueError(f"run.resume=false: {found} exists; choose another run.dir or allow resuming")
    if found and checkpoint.step_of(found) > config.run.steps:
        raise ValueError(
            f"run.steps={config.run.steps}: is below the {checkpoint.step_of(found)} steps done in {found}"
        )
    if layout.is_global_leader:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "config.yaml"
        if found and written.is_file():
            _warn_of_changes(written, config)
        else:
            _write_config(config)
        write_versions(folder)
    return found


def _warn_of_changes(written: Path, config: Config) -> None:
    try:
        changes = changed_lines(written.read_text(encoding="utf-8"), dump_config(config))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read, so what changed since is not known: %s", written, error)
        return
    for line in changes:
        log.warning("resuming with another configuration: %s", line)


def _write_config(config: Config) -> None:
    replace_file(Path(config.run.dir) / "config.yaml", dump_config(config))


def _start_servers(config: Config, stack: contextlib.ExitStack) -> Future[ServerPool]:
    """Servers start while the model is built."""
    executor = stack.enter_context(ThreadPoolExecutor(max_workers=1))
    log.info("starting or reaching SGLang servers")
    future = executor.submit(
        start_servers,
        config.rollout.servers,
        Path(config.model.hf_path),
        config.model.dtype,
        Path(config.run.dir) / "logs",
        seed=config.run.seed,
        device=device_kind(),
        temperature=config.rollout.temperature,
    )
    stack.callback(lambda: future.result().stop() if future.exception() is None else None)
    return future


def _build_policy(config: Config, layout: Layout, objective: Objective) -> Run:
    arch = load_architecture(config.model.hf_path)
    if layout.is_global_leader:
        log.info("%s", features.probe())
    chunks = build_model(
        arch,
        config.model,
        config.parallel,
        layout,
        distributed_optimizer=config.optimizer.distributed,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
    )
    load_initial_weights(chunks, config.model, arch, layout)
    optimizer = build_optimizer(
        chunks, config.optimizer, dtype=config.model.dtype, total_steps=config.run.steps, fp8=config.model.fp8
    )
    reads_reference = objective.needs_reference() and config.objective.reference.keeps_weights()
    rewrite = optimizer.rewrite_weights if config.model.fp8.param_gather else None
    return Run(
        config=config,
        layout=layout,
        arch=arch,
        chunks=chunks,
        optimizer=optimizer,
        objective=objective,
        reference=ReferencePolicy(chunks, rewrite=rewrite) if reads_reference else None,
        leader=None,
        bridge=None,
        router=None,
        writer=None,
    )


def _restore(run: Run, latest: Path) -> checkpoint.Restored:
    restored = checkpoint.load(
        latest, chunks=run.chunks, optimizer=run.optimizer, layout=run.layout, reference=run.reference
    )
    require_known_state(latest, restored.trainer_state)
    run.step, run.batches = restored.step, int(restored.trainer_state["batches"])
    run.is_mid_batch = bool(restored.trainer_state["is_mid_batch"])
    if run.layout.is_global_leader:
        discard_samples(run.dir, restored.step + 1)
        log.info("resuming from %s: %d of %d steps are done", latest, restored.step, run.config.run.steps)
    return restored


def require_known_state(checkpoint_path: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint's ``trainer_state.json`` is not what this version writes."""
    absent = sorted(_STATE_KEYS - state.keys())
    if absent:
        raise ValueError(
            f"{checkpoint_path}/{folder.STATE}: trainer: has no {', '.join(absent)}: another version of "
            "megatron-dypo wrote it, and this one cannot go on from it. `megatron-dypo export` still writes its weights "
            "as an HF folder: start from that by model.hf_path, in another run.dir"
        )


def _build_leader(
    run: Run, restored: checkpoint.Restored | None, stack: contextlib.ExitStack, *, with_servers: bool
) -> Leader | None:
    config, layout = run.config, run.layout
    if layout.leaders_group is None:
        return None
    tokenizer = open_tokenizer(config, run.arch.vocab_size)
    dataset = open_dataset(config, layout, tokenizer)
    verifier, verdicts = None, None
    if with_servers or config.data.drop_wrong_traces:
        verifier = stack.enter_context(Verifier(config.grading, dataset.verifiers))
        check_against_verifier(config, dataset, verifier)
    if verifier is not None:
        verdicts = judge_traces(config, layout, dataset, tokenizer, verifier)
    leader = Leader(
        group=layout.leaders_group,
        tokenizer=tokenizer,
        stream=PromptStream(dataset, tokenizer, config.data, config.run.seed, verdicts=verdicts),
        held_out=open_held_out(config, layout, tokenizer),
        client=None,
        verifier=verifier,
        sample_log=SampleLog(
            run.dir,
            shard=layout.dp_rank if layout.data > 1 else None,
            max_rows=config.logging.samples_per_step,
        ),
    )
    if restored is not None:
        identity = data_identity(config, leader.stream)
        require_same_data(restored.trainer_state["data"], identity, config.run.allow_changed)
        leader.cursor = int(restored.trainer_state["cursor"])
        orders = restored.trainer_state["unfinished"]
        mine = [order for order in orders if order % layout.data == layout.dp_rank]
        leader.unfinished, drops = leader.stream.at(mine)
        leader.drops.append(drops)
        if layout.is_global_leader:
            leader.ledger = Ledger.from_json(restored.trainer_state["ledger"])
        try:
            _share_queues(leader.queues, restored.leader_states, layout)
        except (ValueError, KeyError, SafetensorError) as error:
            damaged = folder.folder_of(run.dir / "checkpoints", restored.step)
            raise ValueError(f"{damaged}: a file leader_*.bin is damaged: {error}") from error
    return leader


def _share_queues(queues: Queues, states: Sequence[bytes], layout: Layout) -> None:
    """What waited, and what is left of the open batch, goes to the replicas of this run in turn, whole groups, however many wrote it."""
    samples = sorted((s for state in states for s in load_samples(state)), key=lambda s: (s.order, s.member))
    groups: dict[int, list] = {}
    for sample in samples:
        groups.setdefault(sample.order, []).append(sample)
    for index, group in enumerate(groups.values()):
        if index % layout.data == layout.dp_rank:
            queues.put(group)


def _share_servers(layout: Layout, pool: ServerPool | None) -> tuple[tuple[str, ...], str | None]:
    """Addresses and key of the servers, from the global leader to every rank."""
    known = (pool.urls, pool.api_key) if pool else ((), None)
    if layout.leaders_group is not None:
        known = broadcast_object(known, layout.leaders_group)
    return broadcast_object(known, layout.replica_group)


def _connect(
    run: Run, urls: tuple[str, ...], api_key: str | None, pool: ServerPool | None, stack: contextlib.ExitStack
) -> None:
    config, router = run.config, run.config.rollout.servers.router
    if run.leader:
        tokenizer = run.leader.tokenizer
        make_client = functools.partial(
            SGLangClient,
            urls,
            api_key,
            cfg=config.rollout,
            decode=lambda tokens: tokenizer.decode(tokens.tolist()),
            stop_token_ids=tokenizer.eos_ids,
            check=pool.check if pool else None,
            router=router,
            vocab_size=run.arch.vocab_size,
        )
        run.leader.client, run.leader.background_client = make_client(), make_client()
        stack.callback(_stop_background, run.leader)
    if router and run.layout.is_global_leader:
        run.router = Router(router, api_key)
    bridge = Refitter(
        run.layout,
        run.arch,
        lambda: named_values(run.chunks),
        urls=urls,
        api_key=api_key,
        config=config.refit,
        run_dir=run.dir,
        hf_reference=Path(config.model.hf_path),
        watch=Watch(take_lost=pool.take_lost, may_return=pool.may_return) if pool else None,
    )
    run.bridge = stack.enter_context(contextlib.closing(bridge))


def _stop_background(leader: Leader) -> None:
    if leader.background is not None:
        leader.background.stop()
