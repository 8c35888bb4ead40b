"""Compute the loss of a microbatch as its docstrings define it: Python floats, token by token, derivatives by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig

FAR = 20.0
"""From this x on, the tangent replaces e^x."""


def exponential(x: float) -> tuple[float, float]:
    """Return (e^x, its derivative), from FAR on by the tangent."""
    if x > FAR:
        return math.exp(FAR) * (1 + x - FAR), math.exp(FAR)
    return math.exp(x), math.exp(x)


def k3(delta: float) -> tuple[float, float]:
    """Return (e^δ − δ − 1, its derivative)."""
    value, slope = exponential(delta)
    return (value - delta - 1 if delta > FAR else math.expm1(delta) - delta), slope - 1


def surrogate(log_rho: float, advantage: float, cfg: ObjectiveConfig) -> tuple[float, float, bool]:
    """Return (loss, derivative by log ρ, whether a bound replaced ρ) by the cases of eq. 22."""
    if advantage > 0 and cfg.clip_high is not None and log_rho > math.log(1 + cfg.clip_high):
        return -advantage * (1 + cfg.clip_high), 0.0, True
    if advantage < 0 and cfg.clip_low is not None and log_rho < math.log(1 - cfg.clip_low):
        return -advantage * (1 - cfg.clip_low), 0.0, True
    if advantage < 0 and cfg.dual_clip and log_rho > math.log(cfg.dual_clip):
        return -advantage * cfg.dual_clip, 0.0, True
    value, slope = exponential(log_rho)
    return -advantage * value, -advantage * slope, False


def shape(logp: float, mean_entropy: float, x: Mapping[str, Any], t: int) -> float:
    """Return the factor of the nll weight of token ``t`` by the shape that ``x["shape"]`` names."""
    p, c = math.exp(logp), x["shape_constant"][t] if "shape_constant" in x else 0.0
    match x["shape"][t] if "shape" in x else "constant":
        case "constant":
            return 1.0
        case "luffy":
            return c * p / (p + c) ** 2
        case "phi":
            return p * (1 - p)
        case "is":
            return p
        case "trsft":
            return p / max(p, c)
        case "srft":
            return math.exp(-mean_entropy) + c * p
        case "srft_luffy":
            return math.exp(-mean_entropy) + c * 0.1 * p / (p + 0.1) ** 2
        case "exp_entropy":
            return math.exp(mean_entropy)
    raise ValueError(x["shape"][t])


@dataclass
class Literal:
    loss: float = 0.0
    size: float = 0.0
    """Σ of the terms' absolute values; rounding errors are relative to it."""
    gradient: list[float] = field(default_factory=list)
    gradient_size: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    distance: float = math.inf
    """Distance of the nearest log-ratio from a bound. If it is below rounding, either side of the bound is right."""

    def add(self, name: str, value: float = 1.0) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def near(self, log: float, *bounds: float | None) -> None:
        self.distance = min([self.distance, *(abs(log - math.log(bound)) for bound in bounds if bound)])


def literal_tokens(
    logp: Sequence[float], entropy: Sequence[float], x: Mapping[str, Sequence[float]], cfg: ObjectiveConfig
) -> Literal:
    """Compute the loss of ``x``: stream → list, with ``is_trace`` and ``sequence`` of each token."""
    out = Literal()
    clips = (cfg.clip_high is not None and 1 + cfg.clip_high, cfg.clip_low is not None and 1 - cfg.clip_low)
    members: dict[float, list[int]] = {}
    for t, sequence in enumerate(x["sequence"]):
        members.setdefault(sequence, []).append(t)
    for t in range(len(logp)):
        whole = members[x["sequence"][t]]
        out.add("tokens")
        weight_of_nll = x["nll_weight"][t] * shape(logp[t], sum(entropy[i] for i in whole) / len(whole), x, t)
        bonus = -x["entropy_weight"][t] * entropy[t] if "entropy_weight" in x else 0.0
        out.add("gal_tokens", x["gal_scale"][t] != 0)
        out.add("gal_sequences", (x["gal_scale"][t] != 0) / len(whole))
        if x["is_trace"][t]:
            loss = -weight_of_nll * logp[t]
            out.add("sft", loss)
            out.add("trace_nll", -logp[t])
            out.add("trace_tokens")
            out.add("entropy_bonus", bonus)
            out.add("objective", loss + bonus)
            _close(out, loss + bonus, -weight_of_nll, abs(loss) + abs(bonus), abs(weight_of_nll))
            continue
        out.add("rollout_tokens")
        out.add("rollouts", 1 / len(whole))
        out.add("entropy", entropy[t])
        moved = [logp[i] - x["old_logp"][i] for i in whole]
        drift = sum(moved) / len(moved)
        out.add("ppo_kl", x["old_logp"][t] - logp[t])
        out.add("gal_drift", abs(drift * x["gal_scale"][t]))
        log_u = [x["old_logp"][i] - x["rollout_logp"][i] for i in whole]
        own_u = x["old_logp"][t] - x["rollout_logp"][t]
        out.add("mismatch_abs", abs(own_u))
        is_token, is_whole = _masks(out, own_u, log_u, cfg.importance)
        weight = 1.0
        if cfg.importance.cap is not None:
            out.near(own_u, cfg.importance.cap)
            out.add("importance_capped", own_u > math.log(cfg.importance.cap))
            weight = math.exp(min(own_u, math.log(cfg.importance.cap)))
        own = logp[t] - x["old_logp"][t]
        region = drift if cfg.gal_clip == "sequence" else own
        is_stopped = False
        if cfg.gal_clip != "none" and x["gal_scale"][t] != 0 and x["nll_weight"][t] != 0:
            out.near(region, *clips)
            is_stopped = region > math.log(clips[0]) if x["nll_weight"][t] > 0 else region < math.log(clips[1])
        out.add("gal_clipped", is_stopped)
        if is_token or is_whole:
            _close(out, 0.0, 0.0, 0.0, 0.0)
            continue
        log_rho = drift if cfg.ratio == "sequence" else own
        out.near(log_rho, *clips, cfg.dual_clip)
        value, slope, is_clipped = surrogate(log_rho, x["advantage"][t], cfg)
        out.add("clipped", is_clipped and x["pg_weight"][t] != 0)
        value, slope = x["pg_weight"][t] * weight * value, x["pg_weight"][t] * weight * slope
        out.add("pg", value)
        penalty, pull = k3(x["ref_logp"][t] - logp[t]) if x["kl_weight"][t] else (0.0, 0.0)
        out.add("kl", x["kl_weight"][t] * penalty)
        nll = 0.0 if is_stopped else weight_of_nll
        own_nll = 0.0 if x["gal_scale"][t] else -nll * logp[t]
        out.add("rollout_nll", own_nll)
        out.add("entropy_bonus", bonus)
        out.add("objective", value + x["kl_weight"][t] * penalty + own_nll + bonus)
        parts = (value, x["kl_weight"][t] * penalty, -nll * logp[t], bonus)
        slopes = (slope, -x["kl_weight"][t] * pull, -nll)
        _close(out, sum(parts), sum(slopes), sum(map(abs, parts)), sum(map(abs, slopes)))
    return out


def _masks(out: Literal, own_u: float, log_u: Sequence[float], cfg: ImportanceConfig) -> tuple[bool, bool]:
    mean, gap = sum(log_u) / len(log_u), sum(map(abs, log_u)) / len(log_u)
    is_token = is_whole = False
    if cfg.token_bounds:
        out.near(own_u, *cfg.token_bounds)
        is_token = not cfg.token_bounds[0] <= math.exp(min(own_u, 99)) <= cfg.token_bounds[1]
    if cfg.sequence_bounds:
        out.near(mean, *cfg.sequence_bounds)
        is_whole = not cfg.sequence_bounds[0] <= math.exp(min(mean, 99)) <= cfg.sequence_bounds[1]
    if cfg.sequence_max_gap is not None:
        out.near(gap, math.exp(cfg.sequence_max_gap))
        is_whole = is_whole or gap > cfg.sequence_max_gap
    out.add("importance_masked", is_token)
    out.add("rollouts_masked", is_whole / len(log_u))
    return is_token, is_whole


def _close(out: Literal, loss: float, slope: float, size: float, slope_size: float) -> None:
    out.loss += loss
    out.size += size
    out.gradient.append(slope)
    out.gradient_size.append(slope_size)
