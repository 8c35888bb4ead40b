"""The worked example of the rivals: two prompts with four rollouts and a trace each, and all gradients by autograd."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.objective.recipes.base import WeightedGroup
from megatron_dypo.objective.recipes.grpo import Grpo
from tests.support.rival_cases import Case, Response, config_of, gradients

EXAMPLE = json.loads((Path(__file__).parent / "published_example.json").read_text(encoding="utf-8"))
SHARED = Path(__file__).parents[4] / "shared" / "baselines_example.json"


class Distilled(Grpo):
    """GRPO with an advantage for each token: Â_i − (log π_old − log π_T), π_T another policy."""

    def token_weights(self, group, totals, step):
        weights = super().token_weights(group, totals, step).weights
        gaps = [s.old_logp - np.array(EXAMPLE["data"]["T"][s.order][s.member], np.float32) for s in group]
        own = [{**w, "advantage": w["advantage"] - gap} for w, gap in zip(weights, gaps, strict=True)]
        return WeightedGroup(weights=own)


DR = {"normalize_std": False, "length_normalization": "constant", "constant_length": 8}
OPEN = {**DR, "clip_low": None, "clip_high": None}
ONE_SFT = {"trace_normalization": "token_mean"}
SUM = {"length_normalization": "sum", "trace_normalization": "sequence_mean"}

ROWS = {
    "sft/sequence_mean": ({"name": "sft"}, 1),
    "sft/token_mean": ({"name": "sft", "length_normalization": "token_mean"}, 1),
    "grpo/sequence_mean_std_clip": ({"name": "grpo"}, 1),
    "grpo/token_mean_std_clip": ({"name": "grpo", "length_normalization": "token_mean"}, 1),
    "grpo/dr_constant_nostd_clip (LUFFY's 'RL')": ({"name": "grpo", **DR}, 1),
    "sft_then_rl/before_switch": ({"name": "sft_then_rl", "sft_steps": 5}, 1),
    "sft_then_rl/after_switch": ({"name": "sft_then_rl", "sft_steps": 5}, 1),
    "fixed/lambda_0.5_sequence_mean": ({"name": "fixed", "options": {"trace_weight": 0.5}}, 1),
    "fixed/lambda_0.1_sequence_mean": ({"name": "fixed", "options": {"trace_weight": 0.1}}, 1),
    # The forks sum over all sequences: n·k times the mean over prompts and members, so that λ/(1−λ) = 1/(n·k).
    "rl_with_sft_loss/code": (
        {"name": "fixed", **OPEN, **ONE_SFT, "options": {"trace_weight": 1 / 7, "trace_takes_a_place": True}},
        7,
    ),
    "superrl/sequence_mean": ({"name": "superrl"}, 1),
    "luffy/final": ({"name": "luffy", **OPEN}, 1),
    "luffy/code": ({"name": "luffy", **OPEN}, 8),
    "luffy/equations_4_6": ({"name": "luffy", "length_normalization": "group_mean"}, 1),
    "relift/rl_step": ({"name": "relift", **OPEN}, 1),
    "relift/ft_step": ({"name": "relift", "options": {"buffer_entropy_coef": 0.0}}, 1),
    "srft/paper": ({"name": "srft", "length_normalization": "sum"}, 1),
    "srft/hpt_code": (
        {"name": "srft", **OPEN, **ONE_SFT, "options": {"variant": "hpt_code", "trace_weight": 0.0625}},
        8,
    ),
    "chord/mu_0.5": ({"name": "chord", "options": {"mu": 0.5, "phi": False}}, 1),
    "chord/phi_mu_0.1": ({"name": "chord", "options": {"mu": 0.1, "phi": True}}, 1),
    "hpt/paper_gamma_0": ({"name": "hpt", **SUM}, 1),
    "hpt/code_gamma_0": ({"name": "hpt", **OPEN, **ONE_SFT, "gamma": 0.125}, 8),
    # The prefix is ⌊0.95·3⌋ = 2 tokens of the trace; the example has no continuation.
    "prefix_rft/released_keep_0.5": ({"name": "prefix_rft", **DR, "options": {"keep": 0.5}}, 1),
    # TrSFT alone: the whole trace is one of eight members, and all members are right.
    "trapo/trsft": ({"name": "trapo"}, 8),
    "opd_grpo/slime_lambda_1": ({"name": f"{__name__}:Distilled"}, 1),
    "hpt/paper_gamma_0.5": ({"name": "hpt", **SUM, "options": {"gate": 0.5}}, 1),
}
"""Name in the example → config, and the example's scale relative to the objective (AdamW ignores a scale)."""


def behind_prefixes(case, i):
    """Make three rollouts, and a fourth that is a prefix of two tokens without a continuation."""
    told = EXAMPLE["data"]["told"][i]
    begun = Response(
        logp=case.trace.logp[:2],
        entropy=case.trace.entropy[:2],
        old_logp=np.array(told[:2]),
        reward=case.rollouts[3].reward,
        forced=2,
    )
    return Case(rollouts=(*case.rollouts[:3], begun), trace=case.trace)


def all_right(case, i):
    """Make seven rollouts and the whole trace, all of them right: only the teacher's tokens have a gradient."""
    own = [dataclasses.replace(y, reward=1.0) for y in (*case.rollouts, *case.rollouts[:3])]
    return Case(rollouts=(*own, dataclasses.replace(case.trace, forced=3)), trace=case.trace)


FORCED = {"prefix_rft/released_keep_0.5": (behind_prefixes, 4), "trapo/trsft": (all_right, 8)}
"""Rows in which the trace is the last member of its group → the function that makes it, and the group's size."""


def cases():
    data = EXAMPLE["data"]
    return [
        Case(
            rollouts=tuple(
                Response(logp=np.array(lp), entropy=np.array(h), old_logp=np.array(old), reward=float(reward))
                for lp, h, old, reward in zip(*rows, strict=True)
            ),
            trace=Response(logp=np.array(lp), entropy=np.array(h), old_logp=np.array(lp), reward=1.0),
        )
        for rows, lp, h in zip(
            zip(data["lp"], data["H"], data["old"], data["R"], strict=True), data["tp"], data["tH"], strict=True
        )
    ]


@pytest.mark.parametrize("name", ROWS)
def test_the_gradients_are_those_of_the_worked_example(name):
    options, scale = ROWS[name]
    with_trace, k = FORCED.get(name, (lambda case, _: case, 4))
    shown = [with_trace(case, i) for i, case in enumerate(cases())]
    mine, _ = gradients(
        shown, config_of(**options), k=k, step=9 if "after_switch" in name else 0, buffered="ft_step" in name
    )
    if name in ("sft_then_rl/after_switch",):
        assert {key[1] for key in mine} == {0, 1, 2, 3}
    expected = EXAMPLE["objectives"][name]
    for i in range(2):
        wanted: dict[Any, Any] = {(i, j): values for j, values in enumerate(expected["grad_rollouts"][i])}
        wanted[i, "trace"] = expected["grad_traces"][i]
        if name in FORCED:
            wanted[i, k - 1] = wanted.pop((i, "trace"))[: shown[i].rollouts[-1].forced]
        for key, values in wanted.items():
            got = scale * mine.get(key, np.zeros(len(values)))
            np.testing.assert_allclose(got, values, rtol=1e-6, atol=1e-8, err_msg=f"{name} {key}")


@pytest.mark.skipif(not SHARED.is_file(), reason="the example that this is a copy of lies outside the repository")
def test_the_example_is_a_copy():
    whole = json.loads(SHARED.read_text(encoding="utf-8"))["base"]
    for name, row in EXAMPLE["objectives"].items():
        assert row.items() <= whole["objectives"][name].items()
    assert EXAMPLE["data"].items() <= whole["data"].items()
