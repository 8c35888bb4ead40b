"""How a replica's leader is made: tokenizer, prompts, evaluation sets, verifier, and the restored position."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_dypo.data.prompts import PromptStream
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.eval.judging import check_sets, grading_of_sets, verifiers_of_sets
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.loop.draws import Draws
from megatron_dypo.loop.replica import Books, Leader
from megatron_dypo.loop.resume import restore_draws
from megatron_dypo.loop.setup.foundation import Foundation
from megatron_dypo.loop.setup.inputs import Inputs, describe_inputs, describe_version, warn_of_unseen_code
from megatron_dypo.loop.setup.open_data import (
    check_against_verifier,
    judge_traces,
    open_dataset,
    open_held_out,
    open_tokenizer,
)
from megatron_dypo.loop.setup.same_inputs import require_same_inputs
from megatron_dypo.metrics.samples import SampleLog
from megatron_dypo.parallel.collectives import broadcast_object
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.teacher.check import name_of_model


@dataclass(frozen=True, kw_only=True)
class OpenedLeader:
    """A leader, and the parts that its requests to servers need."""

    leader: Leader
    tokenizer: Tokenizer
    verifier: Verifier
    """The verifier; its processes run only if the run needs verdicts."""


def open_leader(base: Foundation, leaders: dist.ProcessGroup) -> OpenedLeader:
    """Open and check the data of a replica. Collective over the ``leaders``.

    Raises:
        ValueError: any input breaks a rule, or the inputs are not those of the checkpoint.
    """
    config, ranks = base.config, base.ranks
    tokenizer = open_tokenizer(config, base.policy.arch.vocab_size)
    dataset = open_dataset(config, leaders, tokenizer)
    grading = grading_of_sets(config.grading, config.eval)
    held_out = open_held_out(config, leaders, tokenizer, base.stack)
    named = dataset.verifiers.union(*(one.dataset.verifiers for one in held_out.values()))
    verifier, verdicts = Verifier(grading, named, named_by=verifiers_of_sets(config.grading, config.eval)), None
    if base.with_servers or config.data.drop_wrong_traces:
        base.stack.enter_context(verifier)
        check_against_verifier(config, dataset, verifier)
        check_sets(held_out, grading, verifier)
        verdicts = judge_traces(config, leaders, dataset, tokenizer, verifier)
    source = PromptStream(dataset, tokenizer, config.data, config.run.seed, verdicts=verdicts)
    inputs = _describe_and_compare(base, leaders, source, tokenizer)
    draws = Draws(source=source, ledger=Ledger(), replica=ranks.replica, replicas=ranks.replicas)
    if base.restored is not None:
        restore_draws(draws, base.restored.trainer_state)
    shard = ranks.replica if ranks.replicas > 1 else None
    leader = Leader(
        draws=draws,
        tokenizer=tokenizer,
        held_out=held_out,
        sample_log=SampleLog(base.run_dir, shard=shard, max_rows=config.logging.samples_per_step),
        run_dir=base.run_dir,
        books=Books(ledger=draws.ledger),
        inputs=inputs,
        stop_ids=tokenizer.eos_ids,
    )
    return OpenedLeader(leader=leader, tokenizer=tokenizer, verifier=verifier)


def _describe_and_compare(
    base: Foundation, leaders: dist.ProcessGroup, stream: PromptStream, tokenizer: Tokenizer
) -> Inputs:
    """Return the inputs of this run. Collective over the ``leaders``: the first one reads what is the same for all.

    Raises:
        ValueError: they are not those of the checkpoint.
    """
    config, is_first = base.config, leaders.rank() == 0
    teacher, version = broadcast_object((_teacher(base), describe_version()) if is_first else (None, {}), leaders)
    inputs = describe_inputs(
        config,
        stream=stream,
        tokenizer=tokenizer,
        arch=base.policy.arch,
        reference=base.reference_files,
        teacher=teacher,
        version=version,
    )
    if is_first:
        warn_of_unseen_code(inputs)
    if base.restored is not None:
        stored = base.restored.trainer_state["inputs"]
        require_same_inputs(base.run_dir, stored, inputs, config.run.allow_changed)
    return inputs


def _teacher(base: Foundation) -> str | None:
    cfg = base.config.teacher_servers
    return name_of_model(cfg, read_api_key(cfg.api_key_env)) if base.objective.needs_teacher_logp() else None
