"""The scoring verbs of a training step: log π_old, log π_ref, and log π_θ where the weights have moved on.

Every function here is called by all ranks; samples and answers are on the replica's leaders.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from megatron_dypo.batching.exchange import broadcast_samples
from megatron_dypo.batching.wire import without_arrays
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.run import Run
from megatron_dypo.loop.tally import tally_score_error
from megatron_dypo.loop.update import Batch
from megatron_dypo.mcore.logprobs import sequence_logprobs
from megatron_dypo.types import Floats, Sample


def scores_batch_by_batch(config: Config) -> bool:
    """Whether the trainer scores what enters the next updates, and no more: asynchronous runs with log-probs of their own."""
    return config.rollout.mode == "async" and config.score.policy == "trainer"


def score(run: Run) -> None:
    """log π_old and log π_ref of the rollouts that have none yet.

    A synchronous run scores all that came in: it has not changed the weights since they were sampled, so that the policy
    *is* the one that sampled. An asynchronous run scores what enters the next updates; π_old is the policy now, and
    ``objective.importance`` corrects for the one that sampled.
    """
    unscored = None
    if run.leader:
        queues = run.leader.queues
        unscored = queues.not_scored_by(run.step) if scores_batch_by_batch(run.config) else queues.unscored()
    _score(run, unscored)


def score_early(run: Run) -> None:
    """The same for what waits while the rollout batch still fills: the weights will not change until it is full."""
    _score(run, run.leader.queues.unscored() if run.leader else None)


def _score(run: Run, unscored: Sequence[Sample] | None) -> None:
    old = _old_logprobs(run, unscored)
    reference = old
    if run.objective.needs_reference() and run.reference is not None:
        with run.timings.measure("ref_log_prob"), run.reference.swapped_in():
            reference = _logprobs(run, unscored)
    if unscored is not None and old is not None and reference is not None:
        is_own = run.config.score.policy == "trainer"
        for sample, old_logp, ref_logp in zip(unscored, old, reference, strict=True):
            sample.old_logp, sample.ref_logp = old_logp, ref_logp
            sample.scored_version = run.step if is_own else sample.policy_version


def rescore_stale(run: Run, batch: Batch) -> None:
    """log π_θ of what was scored under older weights, where the objective wants that of this update's policy."""
    if not run.objective.needs_current_logprobs():
        return
    stale = None
    if run.leader:
        members = itertools.chain.from_iterable(batch.groups)
        stale = [s for s in members if s.scored_version is not None and s.scored_version < run.step]
    with run.timings.measure("old_log_prob"):
        current = _logprobs(run, stale)
    if stale is not None and current is not None:
        for sample, logp in zip(stale, current, strict=True):
            sample.current_logp_sum = float(logp.sum(dtype="float64"))


def _old_logprobs(run: Run, unscored: Sequence[Sample] | None) -> Sequence[Floats] | None:
    """By the trainer, or the servers' own (``score.policy``), with what the latter costs measured when it is due."""
    cfg = run.config.score
    with run.timings.measure("old_log_prob"):
        if cfg.policy == "trainer":
            return _logprobs(run, unscored)
        if cfg.check_every and run.batches % cfg.check_every == 0:
            _check(run, unscored)
    return None if unscored is None else [_server_logp(sample) for sample in unscored]


def _check(run: Run, unscored: Sequence[Sample] | None) -> None:
    """Score the oldest new group of each replica by the trainer too, and count how far the servers are off."""
    group = None if unscored is None else [s for s in unscored if s.order == unscored[0].order]
    for sample, logp in zip(group or (), _logprobs(run, group) or (), strict=True):
        tally_score_error(run.tally, logp - _server_logp(sample))


def _server_logp(sample: Sample) -> Floats:
    assert sample.rollout_logp is not None, "a rollout has the log-probs of its server"
    return np.asarray(sample.rollout_logp, np.float32)


def _logprobs(run: Run, samples: Sequence[Sample] | None) -> list[Floats] | None:
    """Log-probs under the weights that the chunks hold now; answered on the leader that gave the samples."""
    bare = None if samples is None else [without_arrays(sample) for sample in samples]
    return logprobs_of_all(run, broadcast_samples(bare, run.layout.replica_group))


def logprobs_of_all(run: Run, samples: Sequence[Sample]) -> list[Floats] | None:
    """As :func:`_logprobs`, of samples that every rank of the replica has already."""
    return sequence_logprobs(
        run.chunks,
        samples,
        layout=run.layout,
        budget=run.config.batching.tokens_per_microbatch,
        token_multiple=run.config.row_multiple,
    )
