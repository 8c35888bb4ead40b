"""The objective's part of the configuration tree; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.distillation.opd import OpdConfig
from megatron_dypo.config.presets import PRESETS
from megatron_dypo.config.reading.typed import nearest
from megatron_dypo.config.schedule import Weight, require_weight

LOG_RATIO_LIMIT = 20.0
"""Ratios of probabilities above e^20 (4.9e8) enter the loss by the tangent of e^x there: an fp32 sum of squares of such
gradients is finite, and no bound of a clip is beyond it."""


_AGREEMENT = "u is 1 where trainer and servers agree"
_LARGEST_BOUND = 1e8
"""Of a clip; below e^LOG_RATIO_LIMIT."""


def _require_finite(section: object) -> None:
    """Require each number of ``section``, those in tuples too, to be finite, and a whole one to fit into 64 bits."""
    for item in fields(section):  # type: ignore[arg-type]
        value = getattr(section, item.name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, float):
                require(math.isfinite(number), f"{item.name}={value}", "must be finite")
            elif isinstance(number, int):
                require(
                    number.bit_length() < 64,
                    f"{item.name}: a number of {number.bit_length()} bits",
                    "must be below 2^63",
                )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """π_ref of GAL and of the KL term."""

    mode: Literal["frozen", "refreshed", "old"] = "frozen"
    """``frozen``: the initial policy. ``refreshed``: the policy of every ``refresh_every`` steps. ``old``: π_old."""
    refresh_every: int = 100
    """Steps between two refreshes, with ``mode: refreshed``."""

    def __post_init__(self) -> None:
        _require_finite(self)
        require_positive(self, "refresh_every")

    def keeps_weights(self) -> bool:
        """Whether π_ref has weights of its own, which the trainer must hold; π_old has none."""
        return self.mode != "old"

    def is_refreshed_after(self, step: int) -> bool:
        """Whether the policy becomes π_ref once ``step`` updates are done."""
        return self.mode == "refreshed" and step % self.refresh_every == 0


@dataclass(frozen=True, kw_only=True)
class OldLogpConfig:
    """The source of log π_old, and with it of GAL's coefficients for fresh rollouts."""

    source: Literal["trainer", "server"] = "trainer"
    """``trainer``: a forward-only pass of the trainer. ``server``: the servers' own log-probs, which save that pass."""
    check_every: int = 1
    """With ``source: server``: rollout batches from one measurement of the servers' error to the next. Each measurement
    is a pass over one group. 0: none."""

    def __post_init__(self) -> None:
        _require_finite(self)
        require_not_negative(self, "check_every")


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Correction for trainer and servers that disagree on the same weights, by u = π_old/π_rollout of each token.

    A masked token contributes nothing: neither policy gradient nor KL nor GAL. Groups keep their advantages and pairs.
    """

    cap: float | None = None
    """Truncated importance sampling: the policy gradient of a token is weighted by min(u, cap); None: by 1. A cap
    below 1 scales tokens down on which trainer and servers agree."""
    token_bounds: tuple[float, float] | None = None
    """Masked importance sampling: tokens of rollouts with u outside [low, high], which has 1 inside, are masked. IcePop
    is this with ``cap: <high>``."""
    sequence_bounds: tuple[float, float] | None = None
    """Rollouts whose geometric mean of u over their tokens is outside [low, high] are masked whole."""
    sequence_max_gap: float | None = None
    """Rollouts whose mean of |log u| over their tokens, in nats, is above this are masked whole."""

    def __post_init__(self) -> None:
        _require_finite(self)
        if self.cap is not None:
            require_positive(self, "cap")
        if self.sequence_max_gap is not None:
            require_positive(self, "sequence_max_gap")
        for name in ("token_bounds", "sequence_bounds"):
            value = getattr(self, name)
            is_right = value is None or (len(value) == 2 and 0 <= value[0] <= 1 <= value[1] and value[0] < value[1])
            require(is_right, f"{name}={value}", f"must be [low, high], 0 <= low < high, with 1 inside: {_AGREEMENT}")

    def is_on(self) -> bool:
        """Whether anything is corrected."""
        return any(getattr(self, f.name) is not None for f in fields(self))


class LossConfig(Protocol):
    """The fields of :class:`ObjectiveConfig` that the loss of a token reads."""

    @property
    def ratio(self) -> Literal["token", "sequence"]: ...
    @property
    def clip_low(self) -> float | None: ...
    @property
    def clip_high(self) -> float | None: ...
    @property
    def dual_clip(self) -> float | None: ...
    @property
    def gal_clip(self) -> Literal["none", "token", "sequence"]: ...
    @property
    def importance(self) -> ImportanceConfig: ...


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective; defaults are the paper's.

    A weight is a number, or a mapping that says how it changes with the optimizer step: ``start``, ``end``, ``steps``
    from the one to the other, ``shape`` (``cosine``, ``linear``, or ``constant``, which jumps at the end) and
    ``warmup``, the steps before in which it rises from 0.
    """

    preset: str | None = None
    """A row of docs/rivals.md, the published settings of a method: it gives every key of this section that the config
    does not. ``name`` is one of them."""
    name: str = "dypo"
    """``dypo``, ``grpo``, ``opd``, ``sft``, ``sft_then_rl`` or a rival of docs/rivals.md; or
    ``my_package.module:MyObjective``, a class of yours (see docs/adding_an_objective.md). Such a name runs the code of
    that module in every training process."""
    alpha: Weight = 0.5
    """α: weight of GRPO against GAL on Mid prompts (eq. 4); a weight."""
    gamma: Weight = 1.0
    """γ: scale of the loss on teachers' traces (eq. 4); a weight."""
    beta_gal: float = 1.0
    """β: inverse temperature of GAL (eq. 14)."""
    gal_coefficients: Literal["exact", "stale"] = "exact"
    """For a batch older than the weights: recompute GAL's coefficients by a forward pass, or keep those of π_old."""
    gal_clip: Literal["none", "token", "sequence"] = "none"
    """Trust region of GAL. ``none``: the paper to the letter. Else GAL gives no gradient to a token of a success whose
    ratio is above 1 + ε_high, nor to one of a failure whose ratio is below 1 − ε_low. The ratio is π_θ/π_old of the
    token (``token``), or the geometric mean of these over the trajectory, for all its tokens at once (``sequence``)."""
    ratio: Literal["token", "sequence"] = "token"
    """ρ of GRPO: that of each token, or GSPO's, the geometric mean over the trajectory, which needs a far smaller ε."""
    length_normalization: Literal["sum", "sequence_mean", "token_mean", "group_mean", "constant"] = "sequence_mean"
    """Divisor of a trajectory's token sum, the same in GRPO, SFT and GAL: 1, its length, the mean length over the
    update, the mean length over its group, or a constant. The means are over sequences of its kind, rollouts or traces,
    in ``token_mean``, and over all members in ``group_mean``."""
    trace_normalization: Literal["same", "sequence_mean", "token_mean"] = "same"
    """What divides the loss on teachers' traces instead. ``token_mean`` is one mean over the tokens of all traces of
    the update, however few prompts have one: it does not divide by the prompts."""
    constant_length: int = 8192
    """The divisor of ``constant``."""
    clip_low: float | None = 0.2
    """ε_low: the ratio is clipped below 1 − ε_low; null: it is not."""
    clip_high: float | None = 0.2
    """ε_high: the ratio is clipped above 1 + ε_high; null: it is not."""
    dual_clip: float | None = None
    """c > 1: bound the surrogate of a negative advantage at c·A (dual-clip PPO); None: off."""
    kl_coef: Weight = 0.0
    """β_KL of the k3 penalty against π_ref; a weight."""
    entropy_coef: Weight = 0.0
    """Weight of the mean entropy of π_θ over all response tokens of the update, traces included, which the loss
    subtracts; a weight."""
    normalize_std: bool = True
    """Divide the advantage by the group's standard deviation."""
    advantage_epsilon: float = 1e-6
    """ξ in (R − mean)/(std + ξ)."""
    hard_without_trace: Literal["drop", "opd"] = "drop"
    """``dypo``: a Hard prompt without a teacher's trace is dropped, or its rollouts are distilled by the teacher of
    ``teacher_servers``, with weight γ (``objective.opd``)."""
    rl_only_steps: int = 0
    """Before this step every prompt goes to RL, whatever its tier."""
    sft_steps: int = 0
    """``sft_then_rl``: steps of the first phase."""
    options: Mapping[str, float | int | bool | str | dict[str, float | int | str]] = field(default_factory=dict)
    """Options of the objective alone: those of a rival are in docs/rivals.md, and one of yours reads them as
    ``cfg.options``. A mapping is a weight that changes with the step."""
    opd: OpdConfig = field(default_factory=OpdConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def __post_init__(self) -> None:
        _require_finite(self)
        self._require_preset()
        require_weight(self, "alpha", high=1.0)
        require_weight(self, "gamma", "kl_coef", "entropy_coef")
        require_not_negative(self, "rl_only_steps", "sft_steps")
        require_positive(self, "beta_gal", "constant_length", "advantage_epsilon")
        self._require_bounds()

    def _require_preset(self) -> None:
        hint = nearest(self.preset or "", PRESETS, otherwise="presets")
        require(self.preset is None or self.preset in PRESETS, f"preset={self.preset}", f"no such preset; {hint}")

    def _require_bounds(self) -> None:
        """Require what bounds the ratio to be a bound."""
        low, high = self.clip_low, self.clip_high
        require(low is None or 0 <= low < 1, f"clip_low={low}", "must be null, or in [0, 1)")
        rule = f"must be null, or in [0, {_LARGEST_BOUND:.0e}]"
        require(high is None or 0 <= high <= _LARGEST_BOUND, f"clip_high={high}", rule)
        bounded = low is not None and high is not None
        require(bounded or self.gal_clip == "none", f"gal_clip={self.gal_clip}", "needs clip_low and clip_high")
        if self.dual_clip is not None:
            rule = f"must be above 1 and at most {_LARGEST_BOUND:.0e}"
            require(1 < self.dual_clip <= _LARGEST_BOUND, f"dual_clip={self.dual_clip}", rule)
