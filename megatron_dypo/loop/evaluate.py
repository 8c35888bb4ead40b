"""Held-out accuracy through the rollout servers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.grading.verify import grade
from megatron_dypo.loop.run import Leader, Run
from megatron_dypo.loop.servers import Sampled, sample
from megatron_dypo.metrics.intervals import accuracy_interval
from megatron_dypo.metrics.names import name_part
from megatron_dypo.metrics.samples import SampleLog, SampleRow, eval_folder, sample_row
from megatron_dypo.types import GradedGroup, Prompt, Treatment

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class PromptScore:
    """What the responses to one held-out prompt came to."""

    source: str
    correct: int
    samples: int
    """Responses with a verdict."""
    without_verdict: int
    truncated: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """What an evaluation set came to on one replica; those of several replicas add up."""

    prompts: tuple[PromptScore, ...] = ()
    lost: int = 0
    """Prompts without a single response: too long, refused or incomplete."""

    def __add__(self, other: SetScore) -> SetScore:
        return SetScore(prompts=self.prompts + other.prompts, lost=self.lost + other.lost)


def evaluate(run: Run) -> dict[str, float]:
    """Accuracy of every evaluation set under the servers' current weights, split over the replicas. Collective.

    The responses are written to ``samples/eval/<set>/``.

    Returns:
        ``eval/<set>/…`` metrics on the leaders, {} elsewhere and when there is no set. An accuracy of nothing is absent.
    """
    metrics: dict[str, float] = {}
    for name in run.config.eval.sets if run.bridge else ():
        mine = _evaluate_share(run, name)
        if run.leader is None:
            continue
        score = sum(gather_objects(mine, run.leader.group), SetScore())
        metrics |= score_metrics(name, score)
        if run.layout.is_global_leader:
            _log_score(run.step, name, metrics)
    return metrics


def score_metrics(name: str, score: SetScore) -> dict[str, float]:
    """The metrics of one set; those of its sources too, where it has several."""
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


def _evaluate_share(run: Run, name: str) -> SetScore:
    """Sample and grade this replica's part of the set: every ``data``-th prompt. Collective over the world."""
    cfg, prompts, too_long = run.config.eval, list[Prompt](), 0
    if run.leader:
        whole, drops = run.leader.held_out[name].all(cfg.max_prompts)
        prompts = whole[run.layout.dp_rank :: run.layout.data]
        too_long = drops.prompts if run.layout.dp_rank == 0 else 0
    # A request for each response: each has a seed of its own.
    draws = [
        replace(p, order=i * cfg.samples_per_prompt + s, visit=s)
        for i, p in enumerate(prompts)
        for s in range(cfg.samples_per_prompt)
    ]
    sampled = sample(
        run,
        draws,
        "eval",
        group_size=1,
        temperature=cfg.temperature,
        seed_of=lambda prompt: response_seed(run.config.run.seed, prompt),
        desc=f"eval {name}",
    )
    if run.leader is None:
        return SetScore()
    groups = _joined(_graded(run, run.leader, sampled), cfg.samples_per_prompt)
    log_of_set = SampleLog(run.dir, shard=run.leader.sample_log.shard, folder=eval_folder(name))
    log_of_set.write(run.step, [_row(run.step, group) for group in groups])
    return SetScore(prompts=tuple(map(_score, groups)), lost=too_long + len(prompts) - len(groups))


def response_seed(seed: int, prompt: Prompt) -> int:
    """The seed of one held-out response: the same in every evaluation of a run, and another for each response."""
    key = json.dumps([seed, prompt.prompt_id, prompt.visit]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def _joined(graded: Sequence[GradedGroup], samples: int) -> list[GradedGroup]:
    """All responses to one prompt together, by the order of the prompts; prompts without any are absent."""
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


def _graded(run: Run, leader: Leader, sampled: Sampled) -> list[GradedGroup]:
    assert leader.verifier is not None
    with run.timings.measure("eval"):
        return grade(
            sampled.groups,
            leader.verifier,
            run.config.grading.fail_truncated,
            show_progress=run.layout.is_global_leader,
        )


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


def _row(step: int, group: GradedGroup) -> SampleRow:
    return sample_row(step, group, Treatment.DROP)
