"""The rivals under tensor, pipeline and context parallelism: the gradient of the weights is the published equation's.

All layouts and objectives share one start of two ranks.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
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
from tests.support.rival_presets import BUFFER_EQUATIONS, EQUATIONS

LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "cp2": {"context": 2}}
PRESETS = (
    "dr_grpo_luffy_paper", "fixed_chord_paper", "superrl_a_paper", "luffy_paper", "luffy_equations", "srft_paper",
    "srft_hpt_code", "chord_phi_paper", "hpt_code", "prefix_rft_code", "trapo_paper", "trapo_code",
    "relift_paper/buffer",
)  # fmt: skip
"""A preset for each way in which a token gets its weight; tests/unit/objective/test_rivals.py has all presets."""
K, VOCAB = 8, 131
FORCED = {"prefix_rft_code": (0.6,), "trapo_paper": (0.3, 0.5, 1), "trapo_code": (0.3, 1)}
"""Share of a teacher's tokens in each of the last rollouts."""


@functools.cache
def groups(forced=()):
    """Make prompts that are right always, sometimes and never; lengths vary, and each has a right trace."""
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.integers(3, VOCAB, rng.integers(low, high)).astype(np.int32)

    def rollout(share):
        response = tokens(1, 10)
        old = (-4.9 + rng.normal(0, 0.5, len(response))).astype(np.float32)
        size = math.ceil(share * len(response))
        return Rollout(
            tokens=response, logp=old, text="r", finish="stop", policy_version=0, num_forced_tokens=size
        )  # fmt: skip

    made = []
    for order, rewards in enumerate(([1.0] * K, [0.0, 1.0] * (K // 2), [0.0] * K)):
        prompt = Prompt(
            prompt_id=str(order), visit=0, order=order, tokens=tokens(2, 6), text="q", answer="1", source="s",
            traces={"teacher": tokens(4, 12)},
        )  # fmt: skip
        verdicts = tuple(Verdict(is_correct=reward > 0, reward=reward) for reward in rewards)
        made.append(
            GradedGroup(
                prompt=prompt,
                rollouts=tuple(rollout(share) for share in (*[0.0] * (K - len(forced)), *forced)),
                verdicts=verdicts,
                tier=grade_tier([verdict.is_correct for verdict in verdicts]),
                trace_verdict=Verdict(is_correct=True, reward=1.0),
            )
        )
    return made


def weighted(name, cfg, entropies):
    """Return the samples of an update with their token weights, as the trainer makes them."""
    objective = build_objective(cfg)
    count = objective.num_rollouts(K)
    shown = [
        dataclasses.replace(g, rollouts=g.rollouts[:count], verdicts=g.verdicts[:count])
        for g in groups(FORCED.get(name, ()))
    ]
    outcome = route(shown, objective, step=0, version=0, seed=0)
    routed = list(filter(None, outcome.buffered if name.endswith("/buffer") else outcome.samples))
    for sample in (s for samples in routed for s in samples if s.kind is SampleKind.ROLLOUT):
        sample.old_logp = sample.rollout_logp
        sample.old_entropy = entropies.get((sample.order, sample.member))
    totals = add_counts([count_groups(routed)])
    return [
        dataclasses.replace(sample, weights=weights)
        for samples in routed
        for sample, weights in zip(samples, objective.weights_of(samples, totals, 0).weights, strict=True)
    ]


def sequence(model, prompt, response, old, reward, forced=0):
    """Return one response under the model: log-probs and entropies with gradient."""
    tokens = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
    logp_LV = torch.log_softmax(model(tokens[None]).logits[0], dim=-1)[len(prompt) - 1 : -1]
    entropy = -(logp_LV.exp() * logp_LV).sum(-1)
    logp = logp_LV.gather(1, tokens[len(prompt) :, None])[:, 0]
    return SimpleNamespace(
        logp=logp, entropy=entropy, old=torch.tensor(old, dtype=torch.float64), reward=reward, forced=forced
    )


def prompts_under(model, forced=()):
    """Return the prompts in the form that an equation reads."""
    prompts = []
    for group in groups(forced):
        make = functools.partial(sequence, model, group.prompt.tokens)
        judged = zip(group.rollouts, group.verdicts, strict=True)
        rollouts = [make(r.tokens, r.logp, v.reward, r.num_forced_tokens) for r, v in judged]
        trace = group.prompt.traces["teacher"]
        prompts.append(SimpleNamespace(rollouts=rollouts, trace=make(trace, np.zeros(len(trace)), 1.0)))
    return prompts


def old_entropies(path, name):
    """Return {(prompt, member): entropies} of the model, which is also π_old here."""
    with torch.no_grad():
        prompts = prompts_under(float64_model(path), FORCED.get(name, ()))
    return {(i, j): y.entropy.numpy() for i, p in enumerate(prompts) for j, y in enumerate(p.rollouts)}


def literal(path, name):
    model = float64_model(path)
    preset, _, update = name.partition("/")
    (BUFFER_EQUATIONS if update else EQUATIONS)[preset](prompts_under(model, FORCED.get(name, ()))).backward()
    return hf_gradients(model)


def test_the_gradient_of_every_weight_is_that_of_the_published_equation_in_every_layout(tmp_path):
    path = str(make_hf_model("qwen3", tmp_path / "model"))
    configs = {name: config_of(preset=name.partition("/")[0]) for name in PRESETS}
    updates = {name: (cfg, weighted(name, cfg, old_entropies(path, name))) for name, cfg in configs.items()}
    # A store keeps the addresses of the groups of one layout.
    stores = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in LAYOUTS]
    ranks = run_ranks(2, rank_gradients, LAYOUTS, [store.port for store in stores], path, updates, deadline_s=500)
    for preset in PRESETS:
        expected = literal(path, preset)
        for layout in LAYOUTS:
            ours = {key: grad for rank in ranks for key, grad in rank[layout, preset].items()}
            assert ours.keys() == expected.keys()
            for key, wanted in expected.items():
                error = np.abs(ours[key] - wanted).max() / np.abs(wanted).max()
                assert error <= 1e-5, f"{preset}, {layout}, {key}: {error:.1e}"
    for layout in LAYOUTS:
        found = [rank[layout, "entropies"]["prefix_rft_code"] for rank in ranks]
        (mine,) = [entropies for entropies in found if entropies is not None]
        for one, wanted in zip(mine, old_entropies(path, "prefix_rft_code").values(), strict=True):
            np.testing.assert_allclose(one, wanted, rtol=1e-5, err_msg=layout)
