"""The scores of a probe's rollouts and traces, and their log-ratios to the reference. Called by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.objective.route import rollout_samples, trace_sample
from megatron_dypo.probe.scores import Scores
from megatron_dypo.types import GradedGroup, Sample, Treatment


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One rollout or trace of a measured prompt."""

    sample: Sample
    prompt_id: str
    repeat: int = -1
    """The group of rollouts that it belongs to; −1 for a trace."""
    teacher: str | None = None


def list_trajectories(group: GradedGroup, group_size: int, step: int) -> list[Trajectory]:
    """Return the rollouts of a prompt in groups of ``group_size``, then the trace of each of its teachers."""
    rollouts = rollout_samples(group, Treatment.REINFORCE)
    found = [
        Trajectory(sample=sample, prompt_id=group.prompt.prompt_id, repeat=sample.member // group_size)
        for sample in rollouts
    ]
    for number, (teacher, tokens) in enumerate(sorted(group.prompt.traces.items()), start=len(rollouts)):
        sample = trace_sample(group, tokens, Treatment.DISTILL, member=number, version=step)
        found.append(Trajectory(sample=sample, prompt_id=group.prompt.prompt_id, teacher=teacher))
    return found


def score_groups(
    groups: Sequence[GradedGroup],
    step: int,
    *,
    policy: Policy,
    ranks: Ranks,
    cfg: ProbeConfig,
    group_size: int,
    reference: str,
) -> Scores | None:
    """Return the scores of this replica's prompts, sorted as :func:`megatron_dypo.probe.scores.join` does.

    Collective over the world.

    Args:
        groups: all rollouts of each prompt, by the order of the prompts; () on ranks that are no leaders.
        step: optimizer steps that made the weights.
        group_size: k.
        reference: name of the policy's own reference, if it keeps one (``objective.reference.mode``).

    Returns:
        None if this replica has no prompt, and on ranks that are no leaders.
    """
    found = [one for group in groups for one in list_trajectories(group, group_size, step)]
    samples = [one.sample for one in found]
    scored = policy.scores(samples, dimension=cfg.dimension, seed=cfg.seed)
    ratios = {"old": np.zeros(len(samples))}
    if policy.keeps_reference:
        theirs_N = [logp.sum(dtype=np.float64) for logp in policy.reference_logprobs(samples)]
        ratios[reference] = scored.logp_N - np.array(theirs_N, np.float64)
    prompts = sorted({(one.sample.order, one.prompt_id) for one in found})
    prompt_ids = [name for _, name in sorted(entry for part in ranks.of_leaders(prompts) for entry in part)]
    named = sorted({one.teacher for one in found if one.teacher is not None})
    teachers = sorted({name for part in ranks.of_leaders(named) for name in part})
    if not found:
        return None
    prompt_of, teacher_of = ({name: index for index, name in enumerate(names)} for names in (prompt_ids, teachers))
    return Scores(
        score_Nd=scored.score_Nd,
        prompt_N=np.array([prompt_of[one.prompt_id] for one in found], np.int64),
        repeat_N=np.array([one.repeat for one in found], np.int64),
        teacher_N=np.array([-1 if one.teacher is None else teacher_of[one.teacher] for one in found], np.int64),
        is_correct_N=np.array([sample.is_correct for sample in samples], np.bool_),
        reward_N=np.array([sample.reward for sample in samples], np.float64),
        length_N=np.array([sample.num_response_tokens for sample in samples], np.int64),
        log_ratio_N=ratios,
        prompt_ids=tuple(prompt_ids),
        teachers=tuple(teachers),
        step=step,
    )
