"""The token-local loss: a plain sum over tokens with token weights, the same for every objective. Pure.

Shape legend: N response tokens of one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.config.objective import LossConfig
from megatron_dypo.objective.importance import Importance, importance
from megatron_dypo.objective.moves import gal_stops, moves_from_old, shown
from megatron_dypo.objective.ratios import bounded_k3, clipped_surrogate
from megatron_dypo.objective.sequences import Across, Sequences
from megatron_dypo.objective.shapes import ShapeInputs, shape_factor
from megatron_dypo.objective.streams import STREAMS, Stream

Sums = dict[str, Tensor]
"""Named sums over the tokens of a microbatch, for the metrics: scalars without gradient."""

VALUE = "objective"
"""The sum that is the objective's value (``train/loss``). The loss itself may have only the gradient of a term."""

_COMMON = {stream.name for stream in STREAMS}
_VALUES = ("pg", "kl", "sft", "rollout_nll", "entropy_bonus")


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The streams of one microbatch's response tokens: ``x["advantage"]`` is [N], without gradient."""

    streams: Mapping[str, Tensor]
    sequence: Tensor
    """[N] int64 sequence of each token, in [0, num_sequences)."""
    num_sequences: int

    def __getitem__(self, name: str) -> Tensor:
        return self.streams[name]


@dataclass(frozen=True, kw_only=True)
class PolicyTokens:
    """The response tokens of one microbatch under the policy, as an objective's own loss term reads them."""

    logp: Tensor
    """[N] log π_θ with gradient; 0, without gradient, where ``objective.importance`` masks the token."""
    entropy: Tensor
    """[N]; with gradient if the objective asks for it (``Objective.needs_entropy_gradient``)."""
    is_kept: Tensor
    """[N] False: the token is masked and must contribute nothing."""
    importance: Tensor
    """[N] u of ``objective.importance``, bounded by its cap; 1 without a cap."""
    sequences: Sequences
    """Computes means over whole sequences, also if they are split over ranks."""


LossTerm = Callable[[PolicyTokens, LossInputs], tuple[Tensor, Sums]]
"""Returns a scalar that is added to the loss, and named sums of its own. Pure; the names are the same in every call."""
TokenLoss = Callable[[Tensor, Tensor, LossInputs, Across | None], tuple[Tensor, Sums]]
"""``(logp_N, entropy_N, inputs, across)`` → the scalar loss, attached to the graph, and named sums."""


def token_loss(
    logp_N: Tensor,
    entropy_N: Tensor,
    x: LossInputs,
    cfg: LossConfig,
    across: Across | None = None,
    term: LossTerm | None = None,
) -> tuple[Tensor, Sums]:
    """Return the sum over the kept tokens of pg_weight·u·L_clip + kl_weight·k3 − nll_weight·w·log π − entropy_weight·H,
    and sums for the metrics.

    - L_clip = −min(ρA, clip(ρ, 1−ε_low, 1+ε_high)A), bounded by −c·A where A < 0 under dual clip (eq. 22). ρ is
      r_t = π_θ/π_old of the token, or s = exp(mean of log r over its sequence) with gradient s·∇log π: GSPO's, for
      pg weights that are the same on all tokens of a sequence (arXiv 2507.18071, sections 4.1, 4.3).
    - u and the masks are those of :mod:`megatron_dypo.objective.importance`. A masked token adds nothing at all, even
      if its log-probs are NaN. Where a kept token reads a value that is not finite, loss and gradient are NaN.
    - k3 = e^δ − δ − 1 with δ = log π_ref − log π_θ.
    - w, without gradient, is the shape of the token (:mod:`megatron_dypo.objective.shapes`), 1 for ``constant``.
    - A clip bound of None does not clip. A trace's token has a ratio only if it has a pg weight.
    - Above a ratio (ρ or π_ref/π_θ) of e^20, the tangent replaces e^x (``LOG_RATIO_LIMIT``): a gradient that no clip
      bounds stays finite and keeps its direction.
    - Under ``gal_clip`` the nll weight of a GAL token is 0 where the ratio, r_t or s, has left the trust region in the
      direction in which GAL moves it: above 1+ε_high where the weight is positive, below 1−ε_low where it is negative.

    Args:
        logp_N: [N] log π_θ of the response tokens, with gradient.
        entropy_N: [N] entropy H of π_θ, with gradient if there are entropy weights.
        across: see :class:`Sequences`.
        term: an objective's own part of the loss.

    Returns:
        The scalar loss, attached to the graph even where N = 0, and float64 sums over the tokens. ``objective``,
        ``pg``, ``kl``, ``sft``, ``rollout_nll`` (that of rollouts, without GAL) and ``entropy_bonus`` are of weighted
        losses; ``rollouts``, ``rollouts_masked`` and ``gal_sequences`` count sequences; ``gal_drift`` is Σ over
        sequences with GAL of |ℓ_θ − ℓ_old|; the others are plain sums or counts.
    """
    sequences = Sequences(x.sequence, x.num_sequences, across)
    is_rollout_N = ~x["is_trace"]
    log_u_N = torch.where(is_rollout_N, x["old_logp"] - x["rollout_logp"], 0.0)
    correction = importance(log_u_N, is_rollout_N, sequences, cfg.importance)
    kept_N, current_N = correction.is_kept, _kept_logp(logp_N, x, correction)
    moves = moves_from_old(logp_N, current_N, kept_N, x.streams, sequences, cfg)
    clip_N, is_clipped_N = clipped_surrogate(moves.log_rho, x["advantage"], cfg)
    delta_N = torch.where((x["kl_weight"] != 0) & kept_N, x["ref_logp"] - current_N, 0.0)
    is_stopped_N = gal_stops(moves, x.streams, cfg)
    shape_N = _shape(current_N, entropy_N, kept_N, x, sequences)
    nll_weight_N = torch.where(kept_N & ~is_stopped_N, x["nll_weight"] * shape_N, 0.0)

    pg_N = torch.where(kept_N, x["pg_weight"] * correction.weight, 0.0) * clip_N
    kl_N, nll_N = x["kl_weight"] * bounded_k3(delta_N), -nll_weight_N * current_N
    bonus_N = -x["entropy_weight"] * torch.where(kept_N & (x["entropy_weight"] != 0), entropy_N, 0.0)
    loss = (pg_N + kl_N + nll_N + bonus_N).sum()
    sums = {
        **_weighted_sums(x, pg=pg_N, kl=kl_N, nll=nll_N, bonus=bonus_N),
        "clipped": is_clipped_N & kept_N & (x["pg_weight"] != 0),
        "ppo_kl": torch.where(is_rollout_N, -moves.log_ratio, 0.0),
        "mismatch_abs": shown(log_u_N, kept_N).abs(),
        **_plain_sums(current_N, entropy_N, kept_N, x, sequences),
        **_importance_sums(correction, sequences),
        **_gal_sums(x, moves.drift, is_stopped_N, sequences),
    }
    totals = {name: value_N.detach().double().sum() for name, value_N in sums.items()}
    totals[VALUE] = sum((totals[name] for name in _VALUES), start=torch.zeros_like(totals["pg"]))
    policy = PolicyTokens(
        logp=current_N, entropy=entropy_N, is_kept=kept_N, importance=correction.weight, sequences=sequences
    )
    return (loss, totals) if term is None else _with_term(loss, totals, *term(policy, x))


def sum_names(loss: TokenLoss, streams: Sequence[Stream]) -> tuple[str, ...]:
    """Return the names of the sums that ``loss`` returns; it is called with no tokens to find out."""
    empty = {stream.name: torch.from_numpy(np.empty(0, stream.dtype)) for stream in streams}
    inputs = LossInputs(streams=empty, sequence=torch.empty(0, dtype=torch.int64), num_sequences=0)
    return tuple(loss(torch.empty(0), torch.empty(0), inputs, None)[1])


def _with_term(loss: Tensor, totals: Sums, own_loss: Tensor, own: Sums) -> tuple[Tensor, Sums]:
    """Add an objective's own term. Its value is ``own["objective"]`` if that is given, else ``own_loss``."""
    value = own.get(VALUE, own_loss)
    own = {name: total for name, total in own.items() if name != VALUE}
    if taken := own.keys() & totals.keys():
        raise ValueError(f"sums {sorted(taken)} of the objective's own term: the loss has these names already")
    totals = totals | {name: total.detach().double() for name, total in own.items()}
    totals[VALUE] = totals[VALUE] + value.detach().double()
    return loss + own_loss, totals


def _weighted_sums(x: LossInputs, *, pg: Tensor, kl: Tensor, nll: Tensor, bonus: Tensor) -> Sums:
    """Return the weighted losses, the nll split by origin; GAL's part of it has a value of its own."""
    return {
        "pg": pg,
        "kl": kl,
        "sft": torch.where(x["is_trace"], nll, 0.0),
        "rollout_nll": torch.where(~x["is_trace"] & (x["gal_scale"] == 0), nll, 0.0),
        "entropy_bonus": bonus,
    }


def _plain_sums(current_N: Tensor, entropy_N: Tensor, kept_N: Tensor, x: LossInputs, sequences: Sequences) -> Sums:
    """Return counts of tokens and rollouts, −log π of traces and entropies of rollouts: no weight is in them."""
    is_rollout_N = ~x["is_trace"]
    return {
        "trace_nll": torch.where(x["is_trace"], -current_N, 0.0),
        "tokens": torch.ones_like(current_N),
        "trace_tokens": x["is_trace"],
        "rollout_tokens": is_rollout_N,
        "rollouts": is_rollout_N * sequences.share_N,
        "entropy": torch.where(is_rollout_N, shown(entropy_N, kept_N), 0.0),
    }


def _importance_sums(correction: Importance, sequences: Sequences) -> Sums:
    return {
        "importance_capped": correction.is_capped,
        "importance_masked": correction.is_token_masked,
        "rollouts_masked": correction.is_sequence_masked * sequences.share_N,
    }


def _gal_sums(x: LossInputs, drift_N: Tensor, is_stopped_N: Tensor, sequences: Sequences) -> Sums:
    is_gal_N = x["gal_scale"] != 0
    return {
        "gal_tokens": is_gal_N,
        "gal_clipped": is_stopped_N,
        "gal_sequences": is_gal_N * sequences.share_N,
        "gal_drift": (drift_N * x["gal_scale"]).abs(),
    }


def _kept_logp(logp_N: Tensor, x: LossInputs, correction: Importance) -> Tensor:
    """[N] log π_θ of the tokens that are kept, 0 of those that are masked.

    If a kept token reads a value that is not finite, value *and gradient* are NaN, whatever its weights are. Otherwise
    a clip or a weight of 0 would hide it from the optimizer, which looks at gradients.
    """
    reads_N = logp_N.detach() + x["advantage"] + x["pg_weight"] + x["kl_weight"] + x["nll_weight"] + correction.weight
    reads_N = reads_N + x["entropy_weight"] + x["nll_shape"] + x["shape_constant"]
    reads_N = reads_N + torch.where(x["is_trace"] & (x["pg_weight"] == 0), 0.0, x["old_logp"])
    reads_N = reads_N + torch.where(x["kl_weight"] != 0, x["ref_logp"], 0.0)
    for name in x.streams.keys() - _COMMON:
        reads_N = reads_N + x[name]
    factor_N = torch.where(correction.is_kept & ~reads_N.isfinite(), math.nan, torch.ones_like(reads_N))
    return torch.where(correction.is_kept, logp_N * factor_N, 0.0)


def _shape(current_N: Tensor, entropy_N: Tensor, kept_N: Tensor, x: LossInputs, sequences: Sequences) -> Tensor:
    """[N] the factor of each token's nll weight."""
    entropy_N = sequences.mean(
        shown(entropy_N, kept_N)
    )  # needed for any shape: with context parallelism all ranks must take part in this sum
    inputs = ShapeInputs(p=current_N.detach().exp(), entropy=entropy_N, constant=x["shape_constant"])
    return shape_factor(x["nll_shape"], inputs)
