"""How a replica's leader is made: tokenizer, prompts, evaluation sets, verifier, and its place after a resume."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_dypo.config.tree import Config
from megatron_dypo.data.prompts import PromptStream
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.loop.draws import Draws
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
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Books, Leader
from megatron_dypo.loop.resume import restored_ledger
from megatron_dypo.mcore.checkpoints.checkpoint import Restored
from megatron_dypo.metrics.samples import SampleLog
from megatron_dypo.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class OpenedLeader:
    """A leader, and what its requests to servers are made of."""

    leader: Leader
    tokenizer: Tokenizer
    verifier: Verifier
    """Runs only where it is kept."""


def open_leader(
    config: Config,
    leaders: dist.ProcessGroup,
    ranks: Ranks,
    arch: Architecture,
    restored: Restored | None,
    stack: contextlib.ExitStack,
    *,
    keeps_verifier: bool,
) -> OpenedLeader:
    """Open and check the data of a replica. Collective over the ``leaders``.

    Args:
        restored: the checkpoint that the run goes on from.
        keeps_verifier: start the verifier, whether or not traces are to be judged.

    Raises:
        ValueError: any input breaks a rule, or the data are not those of the checkpoint.
    """
    tokenizer = open_tokenizer(config, arch.vocab_size)
    dataset = open_dataset(config, leaders, tokenizer)
    verifier, verdicts = Verifier(config.grading, dataset.verifiers), None
    if keeps_verifier or config.data.drop_wrong_traces:
        stack.enter_context(verifier)
        check_against_verifier(config, dataset, verifier)
        verdicts = judge_traces(config, leaders, dataset, tokenizer, verifier)
    source = PromptStream(dataset, tokenizer, config.data, config.run.seed, verdicts=verdicts)
    identity = data_identity(config, source)
    ledger = Ledger()
    if restored is not None:
        require_same_data(restored.trainer_state["data"], identity, config.run.allow_changed)
        ledger = restored_ledger(restored.trainer_state, ranks)
    draws = Draws(source=source, ledger=ledger, replica=ranks.replica, replicas=ranks.replicas)
    if restored is not None:
        draws.resume(int(restored.trainer_state["cursor"]), restored.trainer_state["unfinished"])
    run_dir = Path(config.run.dir)
    shard = ranks.replica if ranks.replicas > 1 else None
    leader = Leader(
        draws=draws,
        tokenizer=tokenizer,
        held_out=open_held_out(config, leaders, tokenizer),
        sample_log=SampleLog(run_dir, shard=shard, max_rows=config.logging.samples_per_step),
        run_dir=run_dir,
        books=Books(ledger=ledger),
        data_identity=identity,
    )
    return OpenedLeader(leader=leader, tokenizer=tokenizer, verifier=verifier)
