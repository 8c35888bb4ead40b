"""Assumptions of the paper, with a verdict for each from the estimates of the probe.

A claim about a sign or an order is decided by the 95% interval. A claim that something is zero cannot be shown; it
holds here if the whole interval is within ``NEGLIGIBLE``, and fails if the interval does not contain zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_dypo.probe.resample import UNKNOWN, Estimate, Tree
from megatron_dypo.probe.teachers import GIVEN

Verdict = Literal["holds", "does not hold", "cannot be told"]
NEGLIGIBLE = 0.1
"""Correlations and relative errors up to this size count as none."""
LEVEL = 0.05
_ONE_TEACHER = "fewer than two teachers"
_NO_TARGET = "without a target the error is the distance from the teachers' mean, which falls as 1/m whatever they are"


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """A claim of the paper and what the measured prompts say about it."""

    name: str
    claim: str
    """One sentence, with the paper's equation where it has one."""
    verdict: Verdict
    estimate: Estimate
    """The figure that decides."""
    why: str


def decide(estimate: Estimate, *, below: float | None = None, above: float | None = None) -> tuple[Verdict, str]:
    """Return the verdict on "the figure is below / above this bound", and its reason."""
    assert (below is None) != (above is None)
    bound = below if below is not None else above
    if estimate.low is None or estimate.high is None:
        return "cannot be told", "there is no interval: too few prompts have data"
    interval = f"the 95% interval is {estimate.low:.3g} to {estimate.high:.3g}"
    if below is not None:
        holds, fails = estimate.high < below, estimate.low >= below
        side = "below"
    else:
        assert above is not None
        holds, fails = estimate.low > above, estimate.high <= above
        side = "above"
    if holds or fails:
        return ("holds" if holds else "does not hold"), f"{interval}, {'' if holds else 'not '}{side} {bound:g}"
    return "cannot be told", f"{interval}, which contains {bound:g}"


def decide_zero(estimate: Estimate) -> tuple[Verdict, str]:
    """Return the verdict on "the figure is zero", and its reason."""
    if estimate.low is None or estimate.high is None:
        return "cannot be told", "there is no interval: too few prompts have data"
    interval = f"the 95% interval is {estimate.low:.3g} to {estimate.high:.3g}"
    if max(abs(estimate.low), abs(estimate.high)) <= NEGLIGIBLE:
        return "holds", f"{interval}, within ±{NEGLIGIBLE:g}"
    if estimate.low > 0 or estimate.high < 0:
        return "does not hold", f"{interval}, without 0"
    return "cannot be told", f"{interval}, which contains 0 and sizes above {NEGLIGIBLE:g}"


def judge(
    moments: Mapping[str, Any], margins: Mapping[str, Any], gates: Mapping[str, Any], teachers: Mapping[str, Any] | None
) -> list[Assumption]:
    """Return all assumptions with their verdicts.

    Args:
        moments: estimates given Mid, by :func:`mixing.estimate_moments`.
        margins: reference → η and others, of the setting's reference.
        gates: name of a gate → its estimates, by :func:`gate.estimate_gate`.
        teachers: by :func:`teachers.estimate_teachers`.
    """
    alpha = moments["mix"]["alpha"]
    ratios = moments["ratios"]
    bounded = [
        ("gal_variance", "GAL's gradient has a smaller variance than GRPO's (eq. 17; figure: Var(GAL)/Var(GRPO)).",
         ratios["gal_to_grpo"], {"below": 1.0}),
        ("mix_variance", f"The mix with α = {alpha:g} has a smaller variance than GRPO alone (eq. 4; figure: "
         "Var(mix)/Var(GRPO)).", ratios["mix_to_grpo"], {"below": 1.0}),
        ("gal_signal", "GAL's smaller variance is more than a smaller gradient: its signal-to-noise ratio is larger "
         "(figure: quotient to GRPO's).", ratios["signal_gal_to_grpo"], {"above": 1.0}),
        ("mix_signal", f"The mix with α = {alpha:g} has a larger signal-to-noise ratio than GRPO (figure: quotient).",
         ratios["signal_mix_to_grpo"], {"above": 1.0}),
        ("eta", "Successes are told from failures, so that η = E[w²] is below ¼ and bounds GAL's variance (eq. 17).",
         margins["eta"], {"below": 0.25}),
        ("same_direction", "The mean gradients of GAL and GRPO point the same way (figure: their cosine).",
         moments["cosine_of_means"], {"above": 0.0}),
        *((f"{name}_gate", f"The gate of {words} is a scalar in expectation (eq. 4; figure: relative error).",
           gates[name]["relative_error"], {"below": NEGLIGIBLE})
          for name, words in (("hard_sft", "Hard for SFT"), ("mid_grpo", "Mid for GRPO"), ("mid_gal", "Mid for GAL"))),
    ]  # fmt: skip
    found = [_assumption(name, claim, figure, decide(figure, **bound)) for name, claim, figure, bound in bounded]
    correlation = ratios["correlation"]
    claim = "GRPO's and GAL's gradients have no covariance, which the paper leaves out (figure: correlation)."
    found.insert(1, _assumption("no_covariance", claim, correlation, decide_zero(correlation)))
    return [*found, _division(teachers), _independence(teachers)]


def _assumption(name: str, claim: str, estimate: Estimate, decided: tuple[Verdict, str]) -> Assumption:
    verdict, why = decided
    return Assumption(name=name, claim=claim, verdict=verdict, estimate=estimate, why=why)


def _division(teachers: Tree | None) -> Assumption:
    """Judge by the part of the error that does not fall with m; the slope σ² is positive whatever the teachers are."""
    claim = (
        "m teachers divide the squared error of one by m (eq. 9 with b² = 0; figure: the share that stays, "
        "b²/(b² + σ²); without a target: σ²)."
    )
    if teachers is None:
        return _assumption("teachers_slope", claim, UNKNOWN, ("cannot be told", _ONE_TEACHER))
    slope: Any = teachers["slope"]
    share: Any = teachers["common_share"]
    if teachers["target"] != GIVEN:
        return _assumption("teachers_slope", claim, slope, ("cannot be told", _NO_TARGET))
    return _assumption("teachers_slope", claim, share, decide_zero(share))


def _independence(teachers: Tree | None) -> Assumption:
    """Judge by Hotelling's test; "holds" needs every correlation to be small as well."""
    claim = "Beyond b², the teachers' errors are independent of each other (eq. 9; figure: largest correlation)."
    if teachers is None:
        return _assumption("teachers_independent", claim, UNKNOWN, ("cannot be told", _ONE_TEACHER))
    test: Any = teachers["equal_products"]
    largest: Any = teachers["largest_correlation"]
    if test["p"] is None:
        return _assumption("teachers_independent", claim, largest, ("cannot be told", test["why"]))
    words = f"Hotelling's test has p = {test['p']:.2g}"
    if test["p"] < LEVEL:
        return _assumption("teachers_independent", claim, largest, ("does not hold", words))
    verdict, why = decide_zero(largest)
    if verdict == "does not hold":
        verdict = "cannot be told"
    return _assumption("teachers_independent", claim, largest, (verdict, f"{words}; {why}"))
