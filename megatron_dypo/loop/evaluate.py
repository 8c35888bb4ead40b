"""Held-out accuracy of the model under training, through the rollout servers of the run.

Prompts, seeds, verifiers, records and figures are the same as in ``megatron-dypo eval`` (:mod:`megatron_dypo.eval`).
Here the replicas share the items, and the weights are the trainer's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dypo.config.evaluation import EvalConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.eval.judging import records_of, score_item
from megatron_dypo.eval.prompts import EvalItem, EvalPrompt
from megatron_dypo.eval.scores import ItemScore, SetScore
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.metrics.names import name_part
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.rollout.collect import collect
from megatron_dypo.types import GradedGroup, Prompt

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The parts of a run that an evaluation uses."""

    replica: Replica
    servers: Servers | NoServers
    ranks: Ranks
    cfg: EvalConfig
    grading: GradingConfig
    """The grading, including the verifiers that sets name."""
    timings: Timings

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether the config asks for an evaluation of the weights of ``step``."""
        is_due = step == last_step or (self.cfg.every > 0 and step % self.cfg.every == 0)
        return is_due and bool(self.cfg.sets)


def evaluate(evaluator: Evaluator, step: int) -> dict[str, float]:
    """Measure the accuracy of every evaluation set under the servers' weights, those of ``step``. Collective.

    The replicas share the prompts of a set. The responses are written to ``samples/eval/<set>/``.

    Returns:
        ``eval/<set>/…`` metrics; {} without a set or servers. A set without a judged response has no accuracy.
    """
    metrics: dict[str, float] = {}
    if isinstance(evaluator.servers, NoServers):
        return metrics
    for name in evaluator.cfg.sets:
        mine = _evaluate_share(evaluator, evaluator.servers, name, step)
        metrics |= score_metrics(name, sum(evaluator.ranks.of_leaders(mine), SetScore()))
        if evaluator.ranks.is_global_leader:
            _log_score(step, name, metrics)
    return metrics


def score_metrics(name: str, score: SetScore) -> dict[str, float]:
    """Return the metrics of one set, and those of its sources if it has several."""
    prefix = f"eval/{name_part(name)}"
    metrics: dict[str, float] = {
        f"{prefix}/num_samples": score.total("samples"),
        f"{prefix}/num_prompts": len(score.items),
        f"{prefix}/num_lost": score.total("lost"),
        f"{prefix}/num_without_verdict": score.total("without_verdict"),
    }
    average, interval = score.average(), score.interval()
    if average is not None and interval is not None:
        metrics |= {f"{prefix}/accuracy": average, f"{prefix}/accuracy_low": interval[0]}
        metrics[f"{prefix}/accuracy_high"] = interval[1]
    # With one response for each prompt, pass@1 and avg@1 are the accuracy.
    metrics |= {f"{prefix}/pass@{k}": value for k, value in score.pass_at().items() if k > 1}
    metrics |= {f"{prefix}/maj@{k}": value for k, value in score.maj_at().items() if k > 1}
    if score.answered:
        metrics[f"{prefix}/truncated_ratio"] = score.total("truncated") / score.answered
        metrics[f"{prefix}/response_len/mean"] = score.total("tokens") / score.answered
    parts = {source: part for source, part in score.by_source().items() if part.total("samples")}
    for source, part in parts.items() if len(parts) > 1 else ():
        average = part.average()
        assert average is not None
        metrics[f"{prefix}/{name_part(source)}/accuracy"] = average
        metrics[f"{prefix}/{name_part(source)}/num_samples"] = part.total("samples")
    return metrics


def _log_score(step: int, name: str, metrics: dict[str, float]) -> None:
    def value(key: str) -> float:
        return metrics[f"eval/{name_part(name)}/{key}"]

    if not value("num_samples"):
        log.warning("step %d: %s has no accuracy: none of its %d prompts was judged", step, name, value("num_prompts"))
        return
    log.info(
        "step %d: %s accuracy %.3f (95%% interval %.3f to %.3f, %d responses)",
        *(step, name, value("accuracy"), value("accuracy_low"), value("accuracy_high"), value("num_samples")),
    )
    if value("num_lost") or value("num_without_verdict"):
        log.warning(
            "step %d: %s: %d responses of %d prompts never came, %d have no verdict: they are in no accuracy",
            *(step, name, value("num_lost"), value("num_prompts"), value("num_without_verdict")),
        )


def _evaluate_share(evaluator: Evaluator, servers: Servers, name: str, step: int) -> SetScore:
    """Sample and grade this replica's part of the set. Collective over the world."""
    replica, settings = evaluator.replica, evaluator.cfg.settings(name)
    items = replica.held_out_items(name)
    ask = functools.partial(
        collect,
        group_size=1,  # a request for each response: each has a seed of its own
        temperature=settings.temperature,
        seed_of=_seed_of,
        with_routes=False,
        desc=f"eval {name}",
    )
    sampled = servers.sample([prompt for _, prompts in items for prompt in prompts], step, "eval", ask)
    with evaluator.timings.measure("eval"):
        graded = servers.grade(sampled.groups)
    by_item: dict[int, list[GradedGroup]] = {}
    for group in graded:
        by_item.setdefault(group.prompt.order // settings.samples_per_prompt, []).append(group)
    # With shuffled options each response has its own prompt, and becomes its own row.
    rows = [
        row
        for _, groups in sorted(by_item.items())
        for row in (groups if settings.shuffle_options else [_joined(groups)])
    ]
    replica.write_evaluation(step, name, rows)
    asked, grading = settings.samples_per_prompt, evaluator.grading
    return SetScore(items=tuple(_score(item, by_item.get(item.number, []), asked, grading) for item, _ in items))


def _seed_of(prompt: Prompt) -> int:
    assert isinstance(prompt, EvalPrompt)
    return prompt.seed


def _joined(groups: Sequence[GradedGroup]) -> GradedGroup:
    """Put all responses to one prompt together."""
    return GradedGroup(
        prompt=replace(groups[0].prompt, visit=0),
        rollouts=tuple(rollout for group in groups for rollout in group.rollouts),
        verdicts=tuple(verdict for group in groups for verdict in group.verdicts),
        tier=None,
    )


def _score(item: EvalItem, groups: Sequence[GradedGroup], asked: int, grading: GradingConfig) -> ItemScore:
    records = [record for group in groups for record in records_of(group, grading)]
    return score_item(item, records, asked=asked, cfg=grading)
