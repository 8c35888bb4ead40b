"""Group Alignment Loss (GAL): a pairwise contrast of successes and failures in one group (paper, eq. 14, 15, 23). Pure.

Shape legend: G members of a group, S its successes, F its failures. The gradient is a sum over trajectories:
∇L_GAL = Σ_i c_i·∇ℓ_i with c_i = ∂L_GAL/∂ℓ_i. The c_i depend only on the group's log-ratios ℓ_i, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.objective.metrics import SumMetric

SATURATED_AT = 5.0
"""A pair counts as saturated above this |β·d|: its weight σ(−β·d) is then within 0.007 of 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class GalStatistics:
    """Diagnostics of one group, means over its pairs."""

    loss: float
    eta: float
    """η = E[w²]; the variance bound of eq. 17 is proportional to it. It is ¼ if every d is 0."""
    saturation: float
    """Share of pairs with |β·d| above SATURATED_AT."""
    margin: float
    """Mean d = ℓ_success − ℓ_failure."""


def gal_coefficients(log_ratio_G: Tensor, is_success_G: Tensor, beta: float) -> Tensor:
    """Return c_i = ∂L_GAL/∂ℓ_i, the mean over the group's pairs.

    Args:
        log_ratio_G: [G] ℓ_i = Σ_t log π_θ − log π_ref, already divided by the length divisor.
        is_success_G: [G] bool.
        beta: inverse temperature β > 0.

    Returns:
        [G] of ``log_ratio_G``'s type, without gradient: −(β/M)·Σ_f w_sf for a success, +(β/M)·Σ_s w_sf for a
        failure, w_sf = σ(−β(ℓ_s − ℓ_f)). They sum to 0; all zero without a pair.

    Raises:
        ValueError: shapes differ or are not [G]; β is not positive.
    """
    margin_SF = _margins(log_ratio_G, is_success_G, beta)
    coef_G = torch.zeros_like(log_ratio_G, requires_grad=False)
    if margin_SF.numel() == 0:
        return coef_G
    weight_SF = torch.sigmoid(-beta * margin_SF)
    scale = beta / margin_SF.numel()
    success_G = is_success_G.bool()
    coef_G[success_G] = -scale * weight_SF.sum(dim=1)
    coef_G[~success_G] = scale * weight_SF.sum(dim=0)
    return coef_G


def gal_statistics(log_ratio_G: Tensor, is_success_G: Tensor, beta: float) -> GalStatistics | None:
    """Return diagnostics of one group, or None if it has no pair. The arguments are those of
    :func:`gal_coefficients`."""
    margin_SF = _margins(log_ratio_G, is_success_G, beta)
    if margin_SF.numel() == 0:
        return None
    weight_SF = torch.sigmoid(-beta * margin_SF)
    saturated_SF = (beta * margin_SF).abs() > SATURATED_AT
    return GalStatistics(
        loss=float(-torch.nn.functional.logsigmoid(beta * margin_SF).mean()),
        eta=float(weight_SF.square().mean()),
        saturation=float(saturated_SF.double().mean()),
        margin=float(margin_SF.mean()),
    )


def gal_sums(statistics: GalStatistics, log_ratio_G: Tensor) -> dict[str, float]:
    """Return one group's share of the sums of :data:`GAL_METRICS`."""
    return {
        "gal_groups": 1.0,
        "gal_loss": statistics.loss,
        "gal_eta": statistics.eta,
        "gal_saturation": statistics.saturation,
        "gal_margin": statistics.margin,
        "gal_members": float(len(log_ratio_G)),
        "gal_log_ratio": float(log_ratio_G.sum()),
    }


GAL_METRICS = (
    SumMetric(
        "gal/loss", "nats", "mean −log σ(β·d) over pairs and groups, not weighted", of="gal_loss", per="gal_groups"
    ),
    SumMetric(
        "gal/eta", "", "η = mean σ(−β·d)² over pairs: ¼ at the reference, 0 when every pair is settled",
        of="gal_eta", per="gal_groups",
    ),
    SumMetric(
        "gal/saturation", "fraction", "pairs with |β·d| above 5, whose gradient has all but vanished or saturated",
        of="gal_saturation", per="gal_groups",
    ),
    SumMetric("gal/margin", "nats", "mean d = ℓ_s − ℓ_f over pairs", of="gal_margin", per="gal_groups"),
    SumMetric(
        "gal/log_ratio", "nats", "mean scaled ℓ that coefficients are computed from, over trajectories of Mid groups",
        of="gal_log_ratio", per="gal_members",
    ),
    SumMetric(
        "gal/drift", "nats",
        "mean |ℓ under this update's weights − ℓ under π_old|, scaled, over trajectories with GAL: the error of stale "
        "coefficients",
        of="gal_drift", per="gal_sequences",
    ),
    SumMetric(
        "gal/clipfrac", "fraction", "tokens with GAL whose gradient objective.gal_clip stopped",
        of="gal_clipped", per="gal_tokens",
    ),
)  # fmt: skip
"""Diagnostics of GAL; their panels are in the report's own table."""


def _margins(log_ratio_G: Tensor, is_success_G: Tensor, beta: float) -> Tensor:
    """[S, F] d_sf = ℓ_s − ℓ_f."""
    if log_ratio_G.dim() != 1 or log_ratio_G.shape != is_success_G.shape:
        raise ValueError(
            f"log_ratio_G {tuple(log_ratio_G.shape)} and is_success_G {tuple(is_success_G.shape)}: must both be [G]"
        )
    if beta <= 0:
        raise ValueError(f"beta={beta}: must be positive")
    log_ratio_G, success_G = log_ratio_G.detach(), is_success_G.bool()
    return log_ratio_G[success_G][:, None] - log_ratio_G[~success_G][None, :]
