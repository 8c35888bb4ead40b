"""The loss that each preset promises at step 0, with the published numbers, not with the config's."""

from __future__ import annotations

from tests.support.forced_equations import prefix_rft, relift, relift_buffer, trapo
from tests.support.rival_equations import (
    Equation,
    chord,
    dr_grpo,
    fixed_chord,
    group_token_mean,
    hpt,
    luffy,
    member_mean_over_8192,
    over_8192,
    own_mean,
    rl_with_sft_loss,
    sft,
    sft_then_rl,
    srft_hpt_code,
    srft_paper,
    superrl,
)

EQUATIONS: dict[str, Equation] = {
    "sft_luffy_paper": sft,
    "dr_grpo_luffy_paper": dr_grpo(0.01),
    "dr_grpo_luffy_code": dr_grpo(0.001),
    "sft_then_rl_luffy_paper": sft_then_rl,
    "fixed_chord_paper": fixed_chord,
    "rl_with_sft_loss_luffy_code": rl_with_sft_loss,
    "superrl_paper": superrl(lambda rewards: max(rewards) == 0),
    "superrl_a_paper": superrl(lambda rewards: len(set(rewards)) == 1),
    "luffy_paper": lambda prompts: luffy(prompts, member_mean_over_8192, std=False, clip=False, coef=0.01),
    "luffy_code": lambda prompts: luffy(prompts, member_mean_over_8192, std=False, clip=False, coef=0.001),
    "luffy_equations": lambda prompts: luffy(prompts, group_token_mean, std=True, clip=True, coef=0.0),
    "srft_paper": srft_paper,
    "srft_hpt_code": srft_hpt_code,
    "chord_mu_paper": chord(0.9, False),
    "chord_phi_paper": chord(0.1, True),
    "chord_code": chord(0.0, True, dual=3.0),
    "hpt_paper": hpt(0.0),
    "hpt_llama_paper": hpt(0.25),
    "relift_paper": relift(group_token_mean, std=True, clip=True, coef=0.0),
    "relift_code": relift(member_mean_over_8192, std=False, clip=False, coef=0.001),
    "prefix_rft_paper": prefix_rft(True, 0.0, None),
    "prefix_rft_code": prefix_rft(True, 0.001, 3.0),
    "trapo_paper": trapo(own_mean, std=True, clip=True, coef=0.0),
    "trapo_code": trapo(over_8192, std=False, clip=False, coef=0.001),
    "hpt_code": hpt(0.0, over_8192, std=False, clip=False, sft_scale=0.1, coef=0.001),
}
"""Preset → its loss at step 0."""
BUFFER_EQUATIONS = {"relift_paper": relift_buffer(1e-4, False), "relift_code": relift_buffer(1e-3, True)}
"""Preset → the loss of an update on buffered traces."""
