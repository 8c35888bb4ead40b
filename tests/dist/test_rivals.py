"""The rivals under tensor, pipeline and context parallelism: the gradient of the weights is the published equation's.

All layouts and objectives share one start of two ranks.
"""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dypo.grading.tiers import grade_tier
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.objective.route import route
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.types import GradedGroup, Prompt, Rollout, SampleKind, Verdict
from tests.support.dist.literal_objective import float64_model, hf_gradients
from tests.support.dist.rival_ranks import rank_gradients
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model
from tests.support.rival_cases import config_of
from tests.support.rival_equations import EQUATIONS

LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "cp2": {"context": 2}}
PRESETS = (
    "dr_grpo_luffy_paper", "fixed_chord_paper", "superrl_a_paper", "luffy_paper", "luffy_equations", "srft_paper",
    "srft_hpt_code", "chord_phi_paper", "hpt_code",
)  # fmt: skip
"""One of each way in which a token gets its weight; tests/unit/objective/test_rivals.py has all."""
K, VOCAB = 4, 131


@functools.cache
def groups():
    """A prompt that is right always, one sometimes, one never; ragged responses, and a right trace each."""
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.integers(3, VOCAB, rng.integers(low, high)).astype(np.int32)

    def rollout():
        response = tokens(1, 10)
        old = (-4.9 + rng.normal(0, 0.5, len(response))).astype(np.float32)
        return Rollout(tokens=response, logp=old, text="r", finish="stop", policy_version=0)

    made = []
    for order, rewards in enumerate(([1.0] * K, [0.0, 1.0, 0.0, 1.0], [0.0] * K)):
        prompt = Prompt(
            prompt_id=str(order), visit=0, order=order, tokens=tokens(2, 6), text="q", answer="1", source="s",
            traces={"teacher": tokens(4, 12)},
        )  # fmt: skip
        verdicts = tuple(Verdict(is_correct=reward > 0, reward=reward) for reward in rewards)
        made.append(
            GradedGroup(
                prompt=prompt,
                rollouts=tuple(rollout() for _ in rewards),
                verdicts=verdicts,
                tier=grade_tier([verdict.is_correct for verdict in verdicts]),
                trace_verdict=Verdict(is_correct=True, reward=1.0),
            )
        )
    return made


def weighted(cfg):
    """The samples of an update with their token weights, as the trainer makes them."""
    objective = build_objective(cfg)
    count = objective.num_rollouts(K)
    shown = [dataclasses.replace(g, rollouts=g.rollouts[:count], verdicts=g.verdicts[:count]) for g in groups()]
    routed = [samples for samples in route(shown, objective, step=0, version=0, seed=0).samples if samples]
    for sample in (s for samples in routed for s in samples if s.kind is SampleKind.ROLLOUT):
        sample.old_logp = sample.rollout_logp
    totals = add_counts([count_groups(routed)])
    return [
        dataclasses.replace(sample, weights=weights)
        for samples in routed
        for sample, weights in zip(samples, objective.weights_of(samples, totals, 0).weights, strict=True)
    ]


def sequence(model, prompt, response, old, reward):
    """One response under the model: log-probs and entropies with gradient."""
    tokens = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
    logp_LV = torch.log_softmax(model(tokens[None]).logits[0], dim=-1)[len(prompt) - 1 : -1]
    entropy = -(logp_LV.exp() * logp_LV).sum(-1)
    logp = logp_LV.gather(1, tokens[len(prompt) :, None])[:, 0]
    return SimpleNamespace(logp=logp, entropy=entropy, old=torch.tensor(old, dtype=torch.float64), reward=reward)


def literal(path, equation):
    model, prompts = float64_model(path), []
    for group in groups():
        make = functools.partial(sequence, model, group.prompt.tokens)
        rollouts = [make(r.tokens, r.logp, v.reward) for r, v in zip(group.rollouts, group.verdicts, strict=True)]
        trace = group.prompt.traces["teacher"]
        prompts.append(SimpleNamespace(rollouts=rollouts, trace=make(trace, np.zeros(len(trace)), 1.0)))
    equation(prompts).backward()
    return hf_gradients(model)


def test_the_gradient_of_every_weight_is_that_of_the_published_equation_in_every_layout(tmp_path):
    path = str(make_hf_model("qwen3", tmp_path / "model"))
    updates = {name: (cfg, weighted(cfg)) for name, cfg in ((name, config_of(preset=name)) for name in PRESETS)}
    # A store keeps the addresses of the groups of one layout.
    stores = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in LAYOUTS]
    ranks = run_ranks(2, rank_gradients, LAYOUTS, [store.port for store in stores], path, updates, deadline_s=500)
    for preset in PRESETS:
        expected = literal(path, EQUATIONS[preset])
        for layout in LAYOUTS:
            ours = {key: grad for rank in ranks for key, grad in rank[layout, preset].items()}
            assert ours.keys() == expected.keys()
            for key, wanted in expected.items():
                error = np.abs(ours[key] - wanted).max() / np.abs(wanted).max()
                assert error <= 1e-5, f"{preset}, {layout}, {key}: {error:.1e}"
