"""Compute DYPO as the paper writes it: one process, float64, a transformers model, a loop over every pair of a group.

Options that the paper does not have are computed as the docstrings of the configuration define them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig
from megatron_dypo.config.schedule import weight_at
from megatron_dypo.types import Sample, SampleKind, Treatment
from tests.support.dist.literal_routes import routed
from tests.support.hf_models import import_transformers
from tests.support.present import present

Group: TypeAlias = Sequence[Sample]
Arrays: TypeAlias = "dict[str, npt.NDArray[np.float64]]"


def float64_model(path: str) -> Any:
    """Load the model of a folder in float64, without transformers' grouped matmuls for experts, which lack float64."""
    auto = import_transformers().AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")


def literal_gradients(path: str, groups: Sequence[Group], cfg: ObjectiveConfig) -> tuple[float, Arrays]:
    """Return loss and HF-named gradients of the whole objective; ``Sample`` has tokens, rewards and all log-probs."""
    model = float64_model(path)
    loss = literal_loss(model, groups, cfg)
    loss.backward()
    return float(loss), hf_gradients(model)


def hf_gradients(model: Any) -> Arrays:
    """Return gradients under the names of a model folder, in which each expert has tensors of its own. Those of gpt-oss
    have one tensor for all experts, as transformers has."""
    gradients: Arrays = {}
    for name, parameter in model.named_parameters():
        head, is_expert, kind = name.partition(".mlp.experts.")
        if not is_expert or model.config.model_type == "gpt_oss":
            gradients[name] = parameter.grad.numpy()
            continue
        for expert, grad in enumerate(parameter.grad):
            parts = grad.chunk(2) if kind == "gate_up_proj" else (grad,)
            for part_name, part in zip(kind.replace("gate_up", "gate_proj up").split(), parts, strict=True):
                gradients[f"{head}.mlp.experts.{expert}.{part_name}.weight"] = part.numpy()
    return gradients


def literal_logprobs(path: str, groups: Sequence[Group]) -> dict[tuple[int, int], npt.NDArray[np.float64]]:
    """Return (order, member) → [R] float64 log-probs of the sample's response."""
    model = float64_model(path)
    with torch.no_grad():
        return {(s.order, s.member): response_logp(model, s).numpy() for group in groups for s in group}


def literal_loss(model: Any, groups: Sequence[Group], cfg: ObjectiveConfig) -> Tensor:
    """Return the loss of eq. 4 and 24, with a model's own log-probs."""
    return loss_of_logprobs([[response_logp(model, sample) for sample in group] for group in groups], groups, cfg)


def loss_of_logprobs(
    logps_by_group: Sequence[Sequence[Tensor]], groups: Sequence[Group], cfg: ObjectiveConfig
) -> Tensor:
    """Return eq. 4 and 24, a mean over the batch's prompts, and the same mean for each objective with a single term."""
    lengths = {kind: [s.num_response_tokens for g in groups for s in g if s.kind is kind] for kind in SampleKind}
    total = torch.zeros((), dtype=torch.float64)
    for group, logps in zip(groups, logps_by_group, strict=True):
        divisors = [divisor(sample, lengths, cfg) for sample in group]
        if group[0].treatment is Treatment.DISTILL:
            total = total - weight_at(cfg.gamma, 0) * logps[0].sum() / divisors[0]
        elif cfg.name == "dypo":
            total = total + cfg.alpha_at(0) * grpo(group, logps, divisors, cfg)
            total = total + (1 - cfg.alpha_at(0)) * gal(group, logps, divisors, cfg)
        else:
            total = total + grpo(group, logps, divisors, cfg)
    return total / len(groups)


def response_logp(model: Any, sample: Sample) -> Tensor:
    tokens = torch.tensor(sample.tokens.astype("int64"))
    with routed(model, sample):
        logp_LV = torch.log_softmax(model(tokens[None]).logits[0], dim=-1)
    logp_L = logp_LV[:-1].gather(1, tokens[1:, None])[:, 0]
    return logp_L[sample.num_prompt_tokens - 1 :]


def divisor(sample: Sample, lengths: Mapping[SampleKind, Sequence[int]], cfg: ObjectiveConfig) -> float:
    of_kind = lengths[sample.kind]
    return {
        "sum": 1.0,
        "sequence_mean": float(sample.num_response_tokens),
        "token_mean": sum(of_kind) / len(of_kind),
        "constant": float(cfg.constant_length),
    }[cfg.length_normalization]


def grpo(group: Group, logps: Sequence[Tensor], divisors: Sequence[float], cfg: ObjectiveConfig) -> Tensor:
    rewards = torch.tensor([s.reward for s in group], dtype=torch.float64)
    advantages = rewards - rewards.mean()
    if cfg.normalize_std:
        advantages = advantages / (rewards.std() + cfg.advantage_epsilon)
    total = torch.zeros((), dtype=torch.float64)
    for sample, logp, advantage, size in zip(group, logps, advantages, divisors, strict=True):
        moved, trusted = log_moves(sample, logp), is_trusted(sample, cfg.importance)
        for t in (t for t in range(len(logp)) if trusted[t]):
            log = moved[t]
            if cfg.ratio == "sequence":
                log = moved.mean().detach() + log - log.detach()
            ratio = torch.exp(log)
            clipped = torch.clamp(ratio, 1 - present(cfg.clip_low), 1 + present(cfg.clip_high))
            token = -torch.minimum(ratio * advantage, clipped * advantage)
            if cfg.importance.cap is not None:
                token = token * min(mismatch(sample)[t], cfg.importance.cap)
            delta = float(present(sample.ref_logp)[t]) - logp[t]
            total = total + (token + weight_at(cfg.kl_coef, 0) * (torch.exp(delta) - delta - 1)) / size
    return total / len(group)


def log_moves(sample: Sample, logp: Tensor) -> Tensor:
    """Return log π_θ/π_old of each token."""
    return logp - torch.tensor(present(sample.old_logp).astype("float64"))


def mismatch(sample: Sample) -> list[float]:
    """Return π_old/π_rollout of each token."""
    return [
        math.exp(float(o) - float(r))
        for o, r in zip(present(sample.old_logp), present(sample.rollout_logp), strict=True)
    ]


def is_trusted(sample: Sample, cfg: ImportanceConfig) -> list[bool]:
    """Return for each token whether it is kept in spite of the mismatch of trainer and servers."""
    us = mismatch(sample)
    low, high = cfg.sequence_bounds or (0.0, math.inf)
    gap = sum(abs(math.log(u)) for u in us) / len(us)
    whole = low <= math.prod(us) ** (1 / len(us)) <= high and gap <= (cfg.sequence_max_gap or math.inf)
    low, high = cfg.token_bounds or (0.0, math.inf)
    return [whole and low <= u <= high for u in us]


def gal(group: Group, logps: Sequence[Tensor], divisors: Sequence[float], cfg: ObjectiveConfig) -> Tensor:
    if cfg.gal_coefficients == "exact" and cfg.gal_clip == "none" and not cfg.importance.is_on():
        return contrast(group, log_ratios(group, logps, divisors), cfg)
    at: Sequence[Tensor] = logps
    if cfg.gal_coefficients == "stale":
        at = [torch.tensor(present(s.old_logp).astype("float64")) for s in group]
    fixed = [ratio.detach().requires_grad_() for ratio in log_ratios(group, at, divisors)]
    coefficients = torch.autograd.grad(contrast(group, fixed, cfg), fixed)
    total = torch.zeros((), dtype=torch.float64)
    for sample, logp, c, size in zip(group, logps, coefficients, divisors, strict=True):
        trusted, stays = is_trusted(sample, cfg.importance), stays_near(sample, logp, cfg)
        learned = [logp[t] for t in range(len(logp)) if trusted[t] and stays[t]]
        total = total + c * sum(learned, start=torch.zeros((), dtype=torch.float64)) / size
    return total


def stays_near(sample: Sample, logp: Tensor, cfg: ObjectiveConfig) -> list[bool]:
    """Return for each token whether GAL may still move it: successes up, failures down."""
    moved = log_moves(sample, logp).detach()
    if cfg.gal_clip == "none":
        return [True] * len(moved)
    ratios = torch.exp(moved.mean().expand_as(moved) if cfg.gal_clip == "sequence" else moved)
    low, high = 1 - present(cfg.clip_low), 1 + present(cfg.clip_high)
    return [r <= high if sample.is_correct else r >= low for r in ratios.tolist()]


def log_ratios(group: Group, logps: Sequence[Tensor], divisors: Sequence[float]) -> list[Tensor]:
    return [
        (logp.sum() - float(present(s.ref_logp).sum(dtype="float64"))) / size
        for s, logp, size in zip(group, logps, divisors, strict=True)
    ]


def contrast(group: Group, ratios: Sequence[Tensor], cfg: ObjectiveConfig) -> Tensor:
    pairs = []
    for s, success in enumerate(group):
        for f, failure in enumerate(group):
            if success.is_correct and not failure.is_correct:
                pairs.append(-torch.nn.functional.logsigmoid(cfg.beta_gal * (ratios[s] - ratios[f])))
    return torch.stack(pairs).sum() / len(pairs)
