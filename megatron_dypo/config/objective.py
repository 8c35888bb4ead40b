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
from megatron_dypo.config.schedule import Weight, bounds, require_weight, weight_at

LOG_RATIO_LIMIT = 20.0
"""Above this log-ratio x the loss replaces e^x by its tangent at the limit (e^20 is 4.9e8). An fp32 sum of squares of
such gradients is still finite, and every clip bound is below e^20."""


_AGREEMENT = "u is 1 where trainer and servers agree"
_LARGEST_BOUND = 1e8
"""Largest clip bound; it is below e^LOG_RATIO_LIMIT."""


def _require_finite(section: object) -> None:
    """Require each number of ``section``, also in tuples, to be finite, and each integer to fit into 64 bits."""
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
    """The reference policy π_ref, which GAL and the KL term read."""

    mode: Literal["frozen", "refreshed", "old"] = "frozen"
    """``frozen``: the initial policy. ``refreshed``: a copy of the policy, taken every ``refresh_every`` steps.
    ``old``: π_old."""
    refresh_every: int = 100
    """Steps between two refreshes, with ``mode: refreshed``."""

    def __post_init__(self) -> None:
        _require_finite(self)
        require_positive(self, "refresh_every")

    def keeps_weights(self) -> bool:
        """Whether the trainer must hold weights for π_ref. With ``old`` it need not: π_ref is π_old."""
        return self.mode != "old"

    def is_refreshed_after(self, step: int) -> bool:
        """Whether the policy becomes π_ref once ``step`` updates are done."""
        return self.mode == "refreshed" and step % self.refresh_every == 0


@dataclass(frozen=True, kw_only=True)
class AutoAlphaConfig:
    """α that follows the probe, with ``objective.alpha: auto``: the α of the least gradient variance."""

    start: float = 0.5
    """α before the first probe."""
    low: float = 0.1
    """Smallest α of any update."""
    high: float = 0.9
    """Largest α of any update."""
    smoothing: float = 0.5
    """Weight of the earlier probes in the running estimates of variances and covariance. 0: the last probe alone."""

    def __post_init__(self) -> None:
        _require_finite(self)
        require(0 <= self.low <= self.high <= 1, f"low={self.low}, high={self.high}", "must be 0 <= low <= high <= 1")
        require(self.low <= self.start <= self.high, f"start={self.start}", "must be from low to high")
        require(0 <= self.smoothing < 1, f"smoothing={self.smoothing}", "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OldLogpConfig:
    """The source of log π_old. GAL's coefficients for fresh rollouts follow from it too."""

    source: Literal["trainer", "server"] = "trainer"
    """``trainer``: a forward-only pass of the trainer. ``server``: the log-probs that the servers return with their
    rollouts; this saves the pass."""
    check_every: int = 1
    """With ``source: server``: measure the error of the servers' log-probs once in this many rollout batches. Each
    measurement is a pass over one group. 0: never. With ``objective.replay: rollout`` two more such passes measure what
    the replay changes."""

    def __post_init__(self) -> None:
        _require_finite(self)
        require_not_negative(self, "check_every")


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Correction for trainer and servers that disagree on the same weights. It uses u = π_old/π_rollout of each token.

    A masked token adds nothing to policy gradient, KL or GAL. Advantages and GAL's pairs still count its rollout.
    """

    cap: float | None = None
    """Truncated importance sampling: the policy gradient of a token is weighted by min(u, cap). ``null``: by 1. A cap
    below 1 also scales down tokens on which trainer and servers agree."""
    token_bounds: tuple[float, float] | None = None
    """Masked importance sampling: mask the tokens whose u is outside [low, high]. The interval must contain 1. IcePop
    is this with ``cap: <high>``."""
    sequence_bounds: tuple[float, float] | None = None
    """Mask the whole rollout if the geometric mean of u over its tokens is outside [low, high]."""
    sequence_max_gap: float | None = None
    """Mask the whole rollout if the mean of |log u| over its tokens, in nats, is above this."""

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
    """The objective. The defaults are the paper's.

    Some keys are weights. A weight is a number, or a mapping that makes it change with the optimizer step: it rises
    from 0 to ``start`` in ``warmup`` steps, then goes to ``end`` in ``steps`` steps. ``shape`` is ``cosine``,
    ``linear``, or ``constant``, which stays at ``start`` and jumps to ``end``.
    """

    preset: str | None = None
    """Published settings of a method, by name (docs/rivals.md lists them). The preset gives every key of this section
    that the config leaves out, ``name`` included."""
    name: str = "dypo"
    """``dypo``, ``grpo``, ``opd``, ``sft``, ``sft_then_rl`` or a method of docs/rivals.md; or
    ``my_package.module:MyObjective``, a class of your own (docs/adding_an_objective.md). Such a name runs the code of
    that module in every training process."""
    alpha: Weight | Literal["auto"] = 0.5
    """α: share of GRPO on Mid prompts; GAL has the share 1 − α (eq. 4). A weight. ``auto``: an experiment of ours, see
    ``auto_alpha``; it needs ``probe.every``."""
    auto_alpha: AutoAlphaConfig = field(default_factory=AutoAlphaConfig)
    gamma: Weight = 1.0
    """γ: scale of the loss on teachers' traces (eq. 4). A weight."""
    beta_gal: float = 1.0
    """β: inverse temperature of GAL (eq. 14)."""
    gal_coefficients: Literal["exact", "stale"] = "exact"
    """GAL's coefficients for samples that older weights made. ``exact``: recompute them by a forward pass. ``stale``:
    keep those of π_old."""
    gal_clip: Literal["none", "token", "sequence"] = "none"
    """Trust region of GAL. ``none``: no trust region, as in the paper. Otherwise GAL gives no gradient to a token of a
    success whose ratio is above 1 + ε_high, nor to a token of a failure whose ratio is below 1 − ε_low. ``token``: the
    ratio is the token's π_θ/π_old. ``sequence``: all tokens share the geometric mean of π_θ/π_old over the
    trajectory."""
    ratio: Literal["token", "sequence"] = "token"
    """The ratio ρ of GRPO. ``token``: each token has its own. ``sequence``: the geometric mean over the trajectory, as
    in GSPO; it needs a far smaller ε."""
    length_normalization: Literal["sum", "sequence_mean", "token_mean", "group_mean", "constant"] = "sequence_mean"
    """Divisor of a trajectory's token sum, the same in GRPO, SFT and GAL. ``sum``: 1. ``sequence_mean``: its length.
    ``token_mean``: the mean length of the update's rollouts for a rollout, of its traces for a trace. ``group_mean``:
    the mean length over all members of its group. ``constant``: ``constant_length``."""
    trace_normalization: Literal["same", "sequence_mean", "token_mean"] = "same"
    """Divisor of the loss on teachers' traces. ``same``: as ``length_normalization``. ``sequence_mean``: the length of
    the trace. ``token_mean``: one mean over the tokens of all traces of the update; it does not divide by the number of
    prompts, however few of them have a trace."""
    constant_length: int = 8192
    """Divisor with ``length_normalization: constant``."""
    clip_low: float | None = 0.2
    """ε_low: the ratio is clipped below 1 − ε_low. ``null``: no lower clip."""
    clip_high: float | None = 0.2
    """ε_high: the ratio is clipped above 1 + ε_high. ``null``: no upper clip."""
    dual_clip: float | None = None
    """c > 1: bound the surrogate of a negative advantage at c·A (dual-clip PPO). ``null``: off."""
    kl_coef: Weight = 0.0
    """β_KL: weight of the KL penalty against π_ref (estimator k3). A weight."""
    entropy_coef: Weight = 0.0
    """Weight of the entropy bonus: the loss subtracts the mean entropy of π_θ over all response tokens of the update,
    traces included. A weight."""
    normalize_std: bool = True
    """Divide the advantage by the group's standard deviation."""
    advantage_epsilon: float = 1e-6
    """ξ in (R − mean)/(std + ξ)."""
    hard_without_trace: Literal["drop", "opd"] = "drop"
    """With ``name: dypo``, the fate of a Hard prompt without a teacher's trace. ``drop``: drop it. ``opd``: the teacher
    of ``teacher_servers`` judges its rollouts token by token (``objective.opd``), with weight γ."""
    replay: Literal["off", "rollout", "trainer"] = "off"
    """The experts that the trainer takes for rollouts (docs/routing_replay.md). ``off``: those that its routers choose.
    ``rollout``: those that the servers chose (R3). ``trainer``: those that its routers chose in the pass for log π_old
    (R2)."""
    rl_only_steps: int = 0
    """Before this step every prompt goes to RL, whatever its tier."""
    sft_steps: int = 0
    """With ``name: sft_then_rl``: steps of the first phase."""
    options: Mapping[str, float | int | bool | str | dict[str, float | int | str]] = field(default_factory=dict)
    """Options that only this objective has. docs/rivals.md lists those of the rivals; an objective of your own reads
    them as ``cfg.options``. A mapping is a weight that changes with the step."""
    opd: OpdConfig = field(default_factory=OpdConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    def __post_init__(self) -> None:
        _require_finite(self)
        self._require_preset()
        if self.alpha != "auto":
            require_weight(self, "alpha", high=1.0)
        require_weight(self, "gamma", "kl_coef", "entropy_coef")
        require_not_negative(self, "rl_only_steps", "sft_steps")
        require_positive(self, "beta_gal", "constant_length", "advantage_epsilon")
        self._require_bounds()

    def alpha_at(self, step: int) -> float:
        """Return α of the update that follows ``step`` updates; with ``auto`` that before the first probe."""
        return self.auto_alpha.start if self.alpha == "auto" else weight_at(self.alpha, step)

    def least_alpha(self) -> float:
        """Return the smallest α of any update."""
        return self.auto_alpha.low if self.alpha == "auto" else bounds(self.alpha)[0]

    def _require_preset(self) -> None:
        hint = nearest(self.preset or "", PRESETS, otherwise="presets")
        require(self.preset is None or self.preset in PRESETS, f"preset={self.preset}", f"no such preset; {hint}")

    def _require_bounds(self) -> None:
        """Require the clip bounds to be in their ranges, and present where ``gal_clip`` needs them."""
        low, high = self.clip_low, self.clip_high
        require(low is None or 0 <= low < 1, f"clip_low={low}", "must be null, or in [0, 1)")
        rule = f"must be null, or in [0, {_LARGEST_BOUND:.0e}]"
        require(high is None or 0 <= high <= _LARGEST_BOUND, f"clip_high={high}", rule)
        bounded = low is not None and high is not None
        require(bounded or self.gal_clip == "none", f"gal_clip={self.gal_clip}", "needs clip_low and clip_high")
        if self.dual_clip is not None:
            rule = f"must be above 1 and at most {_LARGEST_BOUND:.0e}"
            require(1 < self.dual_clip <= _LARGEST_BOUND, f"dual_clip={self.dual_clip}", rule)
