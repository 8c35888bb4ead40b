"""Make prompts with rollouts and traces for the tests of objectives, and the gradients of their tokens.

Shape legend: R response tokens of one sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from megatron_dypo.batching.bins import bins_balanced
from megatron_dypo.batching.pack import pack
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.reading.load import parse_config
from megatron_dypo.grading.tiers import grade_tier
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.route import route
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.types import GradedGroup, Prompt, Rollout, Sample, SampleKind, Verdict
from tests.support.objective_cases import loss_inputs
from tests.support.present import present

Key: TypeAlias = "tuple[int, int | str]"
Gradients: TypeAlias = "dict[Key, np.ndarray]"


@dataclass(frozen=True, kw_only=True)
class Response:
    """One sequence under the policy: [R] arrays."""

    logp: np.ndarray
    entropy: np.ndarray
    old_logp: np.ndarray
    reward: float
    forced: int = 0
    """Number of first tokens that are a teacher's."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt: k responses of the policy, and a teacher's trace or none."""

    rollouts: tuple[Response, ...]
    trace: Response | None


def ragged_cases(seed: int = 0, k: int = 4, longest: int = 9, forced: Sequence[float] = ()) -> list[Case]:
    """Make prompts that are right always, sometimes and never; lengths vary, ratios are inside and outside the clip.

    The last rollouts begin with the shares ``forced`` of a teacher's tokens, at least one; the others have none.
    """
    rng = np.random.default_rng(seed)

    def response(reward: float) -> Response:
        length = int(rng.integers(1, longest))
        logp = rng.normal(-1.2, 0.8, length).clip(-6, -0.01)
        moved = rng.choice([0.0, 0.1, -0.1, 0.4, -0.4], length)
        return Response(logp=logp, entropy=rng.uniform(0.1, 2.0, length), old_logp=logp - moved, reward=reward)

    rewards = [[1.0] * k, [float(i % 2) for i in range(k)], [0.0] * k]
    cases = [Case(rollouts=tuple(map(response, own)), trace=response(1.0)) for own in rewards]
    shares = [*[0.0] * (k - len(forced)), *forced]
    return [dataclasses.replace(case, rollouts=tuple(map(_forced, case.rollouts, shares))) for case in cases]


def _forced(response: Response, share: float) -> Response:
    return dataclasses.replace(response, forced=math.ceil(share * len(response.logp)))


def config_of(**objective: Any) -> ObjectiveConfig:
    """Return the objective's config as a run reads it, with the preset applied."""
    tree = {"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}, "objective": objective}
    return parse_config(tree, where="test").objective


def routed(
    cases: Sequence[Case], objective: Objective, k: int, step: int, *, buffered: bool = False
) -> list[list[Sample]]:
    """Return the samples of each prompt by the objective's own gate, with log π_old; or the traces that it buffers."""
    groups = [_graded(order, case, objective.num_rollouts(k)) for order, case in enumerate(cases)]
    outcome = route(groups, objective, step=step, version=0, seed=0)
    samples = outcome.buffered if buffered else outcome.samples
    for group in samples:
        for sample in group:
            if sample.kind is SampleKind.ROLLOUT:
                sample.old_logp = sample.rollout_logp
                sample.old_entropy = _response(sample, cases).entropy.astype(np.float32)
    return samples


def gradients(
    cases: Sequence[Case],
    cfg: ObjectiveConfig,
    *,
    step: int = 0,
    k: int = 4,
    microbatches: int = 1,
    replicas: int = 1,
    buffered: bool = False,
) -> tuple[Gradients, Gradients]:
    """Return gradients by log π and by the entropy of each sequence's tokens: {(prompt, member or "trace"): [R]} twice.

    Groups are counted on ``replicas`` replicas, packed into ``microbatches``, and the losses are added up.
    ``buffered``: return those of an update on buffered traces.
    """
    objective = build_objective(cfg)
    groups = [group for group in routed(cases, objective, k, step, buffered=buffered) if group]
    totals = add_counts(count_groups(groups[i::replicas]) for i in range(replicas))
    samples = list[Sample]()
    for group in groups:
        weights = objective.weights_of(group, totals, step).weights
        samples += [dataclasses.replace(s, weights=w) for s, w in zip(group, weights, strict=True)]
    of_logp: Gradients = {}
    of_entropy: Gradients = {}
    for members in bins_balanced([1.0] * len(samples), microbatches):
        for key, own in _pass(objective, [samples[i] for i in members], cases).items():
            of_logp[key], of_entropy[key] = own
    return of_logp, of_entropy


def _pass(
    objective: Objective, samples: Sequence[Sample], cases: Sequence[Case]
) -> dict[Key, tuple[np.ndarray, np.ndarray]]:
    """Run loss and backward of one microbatch; return {key: (gradient by log π, gradient by the entropy)}."""
    packed = pack(samples, range(len(samples)), sum(len(s.tokens) for s in samples), streams=objective.streams)
    at = np.flatnonzero(packed.response_T)
    streams: dict[str, Any] = {name: stream[at] for name, stream in packed.streams.items()}
    x = loss_inputs(len(at), sequence=packed.sequence_T[at], **streams)
    responses = [_response(sample, cases) for sample in samples]
    logp_N = torch.tensor(np.concatenate([r.logp for r in responses]), requires_grad=True)
    entropy_N = torch.tensor(np.concatenate([r.entropy for r in responses]), requires_grad=True)
    loss, _ = objective.loss(logp_N, entropy_N, x)
    loss.backward()
    sizes = [len(r.logp) for r in responses]
    entropy_grad = entropy_N.grad if entropy_N.grad is not None else torch.zeros_like(entropy_N)
    pairs = zip(present(logp_N.grad).split(sizes), entropy_grad.split(sizes), strict=True)
    keys: list[Key] = [(s.order, "trace" if s.kind is SampleKind.TRACE else s.member) for s in samples]
    return {key: (one.numpy(), other.numpy()) for key, (one, other) in zip(keys, pairs, strict=True)}


def _response(sample: Sample, cases: Sequence[Case]) -> Response:
    case = cases[sample.order]
    return present(case.trace) if sample.kind is SampleKind.TRACE else case.rollouts[sample.member]


def _graded(order: int, case: Case, count: int) -> GradedGroup:
    prompt = Prompt(
        prompt_id=f"p{order}",
        visit=0,
        order=order,
        tokens=np.array([1, 2], np.int32),
        text="q",
        answer="1",
        source="s",
        traces={"teacher": np.arange(len(case.trace.logp), dtype=np.int32)} if case.trace else {},
    )
    rollouts = tuple(
        Rollout(
            tokens=np.arange(len(r.logp), dtype=np.int32),
            logp=r.old_logp.astype(np.float32),
            text="r",
            finish="stop",
            policy_version=0,
            num_forced_tokens=r.forced,
        )
        for r in case.rollouts[:count]
    )
    verdicts = tuple(_verdict(r) for r in case.rollouts[:count])
    return GradedGroup(
        prompt=prompt,
        rollouts=rollouts,
        verdicts=verdicts,
        tier=grade_tier([v.is_correct for v in verdicts]),
        trace_verdict=_verdict(case.trace) if case.trace else None,
    )


def _verdict(response: Response) -> Verdict:
    return Verdict(is_correct=response.reward > 0, reward=response.reward)
