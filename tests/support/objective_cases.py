"""Random groups and batches for the tests of the objective."""

import numpy as np
import torch

from megatron_dypo.objective.loss import LossInputs
from megatron_dypo.objective.streams import STREAMS
from megatron_dypo.types import GradedGroup, Prompt, Rollout, Sample, SampleKind, Tier, Totals, Treatment, Verdict


def loss_inputs(num_tokens, *, sequence=None, num_sequences=None, **streams) -> LossInputs:
    """Float64 streams of the loss; what is not given is zero, and all tokens are one sequence."""
    zeros = {stream.name: [0.0] * num_tokens for stream in STREAMS}
    tensors = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in {**zeros, **streams}.items()}
    tensors["is_trace"] = tensors["is_trace"].bool()
    index = torch.as_tensor([0] * num_tokens if sequence is None else sequence).long()
    count = int(index.max()) + 1 if num_tokens else 0
    return LossInputs(streams=tensors, sequence=index, num_sequences=num_sequences or count)


def totals_of(groups) -> Totals:
    """Counts over whole groups, as the trainer makes them."""
    by_kind = {kind: [s for g in groups for s in g if s.kind is kind] for kind in SampleKind}
    return Totals(
        num_prompts=len(groups),
        num_sequences={kind: len(samples) for kind, samples in by_kind.items()},
        num_response_tokens={kind: sum(s.num_response_tokens for s in samples) for kind, samples in by_kind.items()},
    )


def graded_group(correct=(), *, traces=("a", "b"), order=0, versions=None, trace_verdict=None) -> GradedGroup:
    """A group whose rollouts are ``correct`` or not; without any it has no tier."""
    prompt = Prompt(
        prompt_id=f"p{order}",
        visit=0,
        order=order,
        tokens=np.array([1, 2, 3], np.int32),
        text="q",
        answer="1",
        source="s",
        traces={name: np.array([7, 8, 9, 2], np.int32) for name in traces},
    )
    rollouts = tuple(
        Rollout(
            tokens=np.array([5, 6 + i], np.int32),
            logp=np.array([-1.0, -2.0], np.float32),
            text="r",
            finish="stop",
            policy_version=(versions or [4] * len(correct))[i],
        )
        for i in range(len(correct))
    )
    verdicts = tuple(Verdict(is_correct=c, reward=float(c) - 0.1) for c in correct)
    tier = Tier.EASY if all(correct) else Tier.MID if any(correct) else Tier.HARD
    return GradedGroup(
        prompt=prompt,
        rollouts=rollouts,
        verdicts=verdicts,
        tier=tier if correct else None,
        trace_verdict=trace_verdict,
    )


GROUP_OF = {
    Tier.EASY: graded_group([True, True]),
    Tier.MID: graded_group([True, False]),
    Tier.HARD: graded_group([False, False]),
    None: graded_group(),
}
"""A group of each tier, and one without rollouts."""


def random_groups(seed, *, num_hard=2, num_mid=3, group_size=4, vocab=50, max_response=9):
    """``num_hard`` traces and ``num_mid`` groups with at least one success and one failure each."""
    rng = np.random.default_rng(seed)
    groups = []
    for order in range(num_hard + num_mid):
        prompt = rng.integers(3, vocab, rng.integers(2, 6)).astype(np.int32)
        is_mid = order >= num_hard
        correct = rng.permutation(group_size) % 2 == 0
        members = []
        for member in range(group_size if is_mid else 1):
            length = int(rng.integers(1, max_response))
            logps = (rng.normal(-2, 0.5, length).astype(np.float32) for _ in range(3))
            rollout_logp, old_logp, ref_logp = logps if is_mid else (None, None, None)
            response = rng.integers(3, vocab, length).astype(np.int32)
            members.append(
                Sample(
                    order=order,
                    member=member,
                    treatment=Treatment.REINFORCE if is_mid else Treatment.DISTILL,
                    kind=SampleKind.ROLLOUT if is_mid else SampleKind.TRACE,
                    tokens=np.concatenate([prompt, response]),
                    num_prompt_tokens=len(prompt),
                    policy_version=0,
                    is_correct=bool(is_mid and correct[member]),
                    reward=float(is_mid and correct[member]) + (0.1 * member if is_mid else 0.0),
                    rollout_logp=rollout_logp,
                    old_logp=old_logp,
                    ref_logp=ref_logp,
                )
            )
        groups.append(members)
    return groups
