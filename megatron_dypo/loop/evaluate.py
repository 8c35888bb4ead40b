"""Held-out accuracy through the rollout servers."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dypo.config.evaluation import EvalConfig
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.metrics.intervals import accuracy_interval
from megatron_dypo.metrics.names import name_part
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.rollout.collect import collect
from megatron_dypo.types import GradedGroup, Prompt

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class PromptScore:
    """Counts over the responses to one held-out prompt."""

    source: str
    correct: int
    samples: int
    """Responses with a verdict."""
    without_verdict: int
    truncated: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """The results of one replica on an evaluation set; those of several replicas add up."""

    prompts: tuple[PromptScore, ...] = ()
    lost: int = 0
    """Prompts without a single response: too long, refused or incomplete."""

    def __add__(self, other: SetScore) -> SetScore:
        return SetScore(prompts=self.prompts + other.prompts, lost=self.lost + other.lost)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The parts of a run that an evaluation uses."""

    replica: Replica
    servers: Servers | NoServers
    ranks: Ranks
    cfg: EvalConfig
    seed: int
    timings: Timings

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether the weights of ``step`` are to be evaluated."""
        is_due = step == last_step or (self.cfg.every > 0 and step % self.cfg.every == 0)
        return is_due and bool(self.cfg.prompts)


def evaluate(evaluator: Evaluator, step: int) -> dict[str, float]:
    """Measure the accuracy of every evaluation set under the servers' weights, those of ``step``. Collective.

    The replicas share the prompts of a set. The responses are written to ``samples/eval/<set>/``.

    Returns:
        ``eval/<set>/…`` metrics; {} without a set or servers. An accuracy of nothing is absent.
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
    """Return the metrics of one set, and those of its sources where it has several."""
    prefix = f"eval/{name_part(name)}"
    samples = sum(prompt.samples for prompt in score.prompts)
    answered = samples + sum(prompt.without_verdict for prompt in score.prompts)
    metrics: dict[str, float] = {
        f"{prefix}/num_samples": samples,
        f"{prefix}/num_prompts": len(score.prompts) + score.lost,
        f"{prefix}/num_lost": score.lost,
        f"{prefix}/num_without_verdict": answered - samples,
    }
    judged = [prompt for prompt in score.prompts if prompt.samples]
    if judged:
        metrics[f"{prefix}/accuracy"] = _accuracy(judged)
        low, high = accuracy_interval([p.correct for p in judged], [p.samples for p in judged])
        metrics |= {f"{prefix}/accuracy_low": low, f"{prefix}/accuracy_high": high}
    if answered:
        metrics[f"{prefix}/truncated_ratio"] = sum(prompt.truncated for prompt in score.prompts) / answered
        metrics[f"{prefix}/response_len/mean"] = sum(prompt.tokens for prompt in score.prompts) / answered
    sources = sorted({prompt.source for prompt in judged})
    for source in sources if len(sources) > 1 else ():
        of_source = [prompt for prompt in judged if prompt.source == source]
        metrics[f"{prefix}/{name_part(source)}/accuracy"] = _accuracy(of_source)
        metrics[f"{prefix}/{name_part(source)}/num_samples"] = sum(prompt.samples for prompt in of_source)
    return metrics


def _accuracy(prompts: Sequence[PromptScore]) -> float:
    return sum(prompt.correct for prompt in prompts) / sum(prompt.samples for prompt in prompts)


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
            "step %d: %s: %d of %d prompts have no response, %d responses have no verdict: they are in no accuracy",
            *(step, name, value("num_lost"), value("num_prompts"), value("num_without_verdict")),
        )


def _evaluate_share(evaluator: Evaluator, servers: Servers, name: str, step: int) -> SetScore:
    """Sample and grade this replica's part of the set. Collective over the world."""
    cfg, replica, seed = evaluator.cfg, evaluator.replica, evaluator.seed
    prompts, too_long = replica.held_out_prompts(name, cfg.max_prompts)
    # A request for each response: each has a seed of its own.
    draws = [
        replace(p, order=i * cfg.samples_per_prompt + s, visit=s)
        for i, p in enumerate(prompts)
        for s in range(cfg.samples_per_prompt)
    ]
    ask = functools.partial(
        collect,
        group_size=1,
        temperature=cfg.temperature,
        seed_of=lambda prompt: response_seed(seed, prompt),
        desc=f"eval {name}",
    )
    sampled = servers.sample(draws, step, "eval", ask)
    with evaluator.timings.measure("eval"):
        graded = servers.grade(sampled.groups)
    groups = _joined(graded, cfg.samples_per_prompt)
    replica.write_evaluation(step, name, groups)
    return SetScore(prompts=tuple(map(_score, groups)), lost=too_long + len(prompts) - len(groups))


def response_seed(seed: int, prompt: Prompt) -> int:
    """Return the seed of one held-out response: the same in every evaluation of a run, another for each response."""
    key = json.dumps([seed, prompt.prompt_id, prompt.visit]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def _joined(graded: Sequence[GradedGroup], samples: int) -> list[GradedGroup]:
    """Put all responses to one prompt together, in the order of the prompts; leave out prompts without any."""
    by_prompt: dict[int, list[GradedGroup]] = {}
    for group in graded:
        by_prompt.setdefault(group.prompt.order // samples, []).append(group)
    return [
        GradedGroup(
            prompt=replace(groups[0].prompt, order=number, visit=0),
            rollouts=tuple(rollout for group in groups for rollout in group.rollouts),
            verdicts=tuple(verdict for group in groups for verdict in group.verdicts),
            tier=None,
        )
        for number, groups in sorted(by_prompt.items())
    ]


def _score(group: GradedGroup) -> PromptScore:
    judged = [verdict for verdict in group.verdicts if verdict.error is None]
    return PromptScore(
        source=group.prompt.source,
        correct=sum(verdict.is_correct for verdict in judged),
        samples=len(judged),
        without_verdict=len(group.verdicts) - len(judged),
        truncated=sum(rollout.finish == "length" for rollout in group.rollouts),
        tokens=sum(len(rollout.tokens) for rollout in group.rollouts),
    )
