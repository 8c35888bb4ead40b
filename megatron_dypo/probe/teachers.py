"""The bias of 1..m teachers against a target (eq. 9), and a test of its premise: errors of teachers are independent.

For a prompt q and a teacher j the error is e_j(q) = g_j(q) − g*(q), the gradient of L_SFT on the teacher's trace minus
that of the target. With D_q[j, l] = ⟨e_j(q), e_l(q)⟩ and means over prompts,

    b² = mean of D[j, l] over j ≠ l        σ² = mean of D[j, j] − b²        E|mean error of m teachers|² = b² + σ²/m

The last equation is an identity for the mean over all subsets of m teachers, whatever the errors are, and σ² is half
the mean squared distance of two teachers, which is positive unless they agree. So a fit of the curve can not fail;
three things can. The share b²/(b² + σ²) of one teacher's squared error is not 0: m teachers do not divide that part,
which is a bias of all or comes from traces that copy each other. The nested subsets in the configured order lie off the
curve. And the entries of D differ more than by chance, which Hotelling's T² over prompts tells. A target that is a mean
over few samples has an error of its own, which all teachers share: it is part of b².

Without an external target, g* is the mean of all M teachers. Then b² cannot be measured, and is 0 by construction: what
all teachers have in common counts as right. Errors against their own mean are too small by σ²/M, which is added back.
Suffixes: see ``scores.py``; J pairs of teachers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_dypo.checks import require
from megatron_dypo.probe.gradients import Setting, sft_gradients
from megatron_dypo.probe.resample import UNKNOWN, Estimate, Tree, estimate, jackknife_weights, ratio
from megatron_dypo.probe.scores import Floats, Scores

GIVEN = "given"
"""The estimates' ``target`` where there is one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherErrors:
    """Products of the errors of M teachers, of the prompts that have a trace of each, and of the target."""

    names: tuple[str, ...]
    product_PMM: Floats
    """D_q."""
    has_target: bool


def teacher_errors(scores: Scores, setting: Setting, target: str | None = None) -> TeacherErrors:
    """Compute D_q for every complete prompt.

    Args:
        target: the teacher in whose place the right answer's own data are; None: the mean of all teachers.

    Raises:
        ValueError: no teacher has that name.
    """
    known = ", ".join(scores.teachers) or "none"
    require(
        target is None or target in scores.teachers, f"target={target}", f"must be a teacher of the scores: {known}"
    )
    gradient_PMd, has_PM = sft_gradients(scores, setting)
    gradient_PMd = gradient_PMd[has_PM.all(axis=1)]
    rest = [index for index, name in enumerate(scores.teachers) if name != target]
    error_PMd = gradient_PMd[:, rest]
    if target is None:
        centre_Pd = error_PMd.mean(axis=1) if rest else error_PMd.sum(axis=1)
    else:
        centre_Pd = gradient_PMd[:, scores.teachers.index(target)]
    error_PMd = error_PMd - centre_Pd[:, None]
    return TeacherErrors(
        names=tuple(scores.teachers[index] for index in rest),
        product_PMM=error_PMd @ error_PMd.transpose(0, 2, 1),
        has_target=target is not None,
    )


def estimate_teachers(errors: TeacherErrors, *, seed: int = 0) -> Tree | None:
    """Return b², σ² (the slope of the curve over 1/m), the curve and the tests; None with fewer than two teachers.

    ``common_share`` is b²/(b² + σ²), unknown without a target.
    """
    num_prompts, num_teachers = errors.product_PMM.shape[:2]
    if num_teachers < 2 or num_prompts == 0:
        return None
    weight_BP = jackknife_weights(num_prompts, seed)
    product_BMM = np.einsum("bp,pij->bij", weight_BP, errors.product_PMM) / weight_BP.sum(axis=1)[:, None, None]
    offset_B, slope_B = _fit(product_BMM)
    correction_B = np.zeros_like(slope_B) if errors.has_target else slope_B / num_teachers
    curve: list[Tree] = []
    for m in range(1, num_teachers + 1):
        nested_B = product_BMM[:, :m, :m].mean(axis=(1, 2)) + correction_B
        subsets_B = offset_B + slope_B / m + correction_B
        curve.append(
            {
                "teachers": m,
                "all_subsets": estimate(subsets_B, informative=num_prompts),
                "nested": estimate(nested_B, informative=num_prompts),
                "nested_minus_fit": estimate(nested_B - subsets_B, informative=num_prompts),
            }
        )
    return {
        "names": ", ".join(errors.names),
        "prompts": num_prompts,
        "target": GIVEN if errors.has_target else "mean of all teachers: b² is 0 by construction",
        "offset": estimate(offset_B, informative=num_prompts)
        if errors.has_target
        else Estimate(value=0.0, low=None, high=None),
        "slope": estimate(slope_B, informative=num_prompts, scale="log"),
        "common_share": _common_share(offset_B, slope_B, num_prompts) if errors.has_target else UNKNOWN,
        "curve": curve,
        "equal_products": hotelling(off_diagonal(errors.product_PMM)),
        "equal_sizes": hotelling(_diagonal(errors)),
        "largest_correlation": _largest_correlation(product_BMM, num_prompts),
    }


def hotelling(value_PJ: Floats) -> Tree:
    """Test by Hotelling's T² whether J quantities have equal means over prompts: J − 1 contrasts, F distributed.

    Contrasts that are 0 on every prompt count as none: where a teacher always copies another, their products with a
    third are the same.

    Returns:
        ``p``, None if there is nothing to test, or too few prompts for as many contrasts; ``why`` says which.
    """
    num_prompts, num_values = value_PJ.shape
    contrasts = num_values - 1
    if contrasts < 1:
        return {"p": None, "contrasts": 0, "why": "one quantity alone: nothing to compare"}
    if num_prompts <= contrasts + 1:
        why = f"{num_prompts} prompts are too few for {contrasts} contrasts: at least {contrasts + 2} are needed"
        return {"p": None, "contrasts": contrasts, "why": why}
    difference_PC = value_PJ[:, 1:] - value_PJ[:, :1]
    mean_C, covariance_CC = difference_PC.mean(axis=0), np.atleast_2d(np.cov(difference_PC.T))
    contrasts = int(np.linalg.matrix_rank(covariance_CC, hermitian=True))
    solved_C = np.linalg.lstsq(covariance_CC, mean_C, rcond=None)[0]
    if contrasts == 0 or not np.allclose(covariance_CC @ solved_C, mean_C):
        return {"p": None, "contrasts": contrasts, "why": "differences are the same on every prompt"}
    t_squared = num_prompts * float(mean_C @ solved_C)
    freedom = num_prompts - contrasts
    p = float(stats.f.sf(t_squared * freedom / (contrasts * (num_prompts - 1)), contrasts, freedom))
    return {"p": p, "contrasts": contrasts, "why": f"T² = {t_squared:.3g} over {num_prompts} prompts"}


def off_diagonal(product_PMM: Floats) -> Floats:
    """Return [P, J] the products of the errors of each pair of teachers."""
    rows, columns = np.triu_indices(product_PMM.shape[1], k=1)
    return np.asarray(product_PMM[:, rows, columns])


def _diagonal(errors: TeacherErrors) -> Floats:
    """Return [P, M] squared errors. Of two teachers without a target they are equal, which leaves nothing to test."""
    squares_PM: Floats = np.einsum("pii->pi", errors.product_PMM)
    return np.asarray(squares_PM[:, :1]) if not errors.has_target and len(errors.names) == 2 else squares_PM


def _fit(product_BMM: Floats) -> tuple[Floats, Floats]:
    """Return [B] b² and [B] σ²."""
    offset_B = off_diagonal(product_BMM).mean(axis=1)
    return offset_B, np.einsum("bii->b", product_BMM) / product_BMM.shape[1] - offset_B


def _common_share(offset_B: Floats, slope_B: Floats, informative: int) -> Estimate:
    """Return b²/(b² + σ²), the mean correlation of the errors of two teachers about the target."""
    share_B = ratio(offset_B, offset_B + slope_B)
    return estimate(share_B, informative=informative, scale="fisher", least=-1.0, largest=1.0)


def _largest_correlation(product_BMM: Floats, informative: int) -> Estimate:
    """Return (D[j, l] − b²)/σ² of the pair where it is largest in size, with an interval for all pairs together.

    The interval is from the lowest to the highest end over all pairs, each at its own 95%: it is wider than that of the
    largest pair alone, which was chosen after the fact.
    """
    offset_B, slope_B = _fit(product_BMM)
    pairs = off_diagonal(product_BMM)
    if pairs.shape[1] < 2 or slope_B[0] <= 0:
        return UNKNOWN
    found = [estimate((pair_B - offset_B) / slope_B, informative=informative) for pair_B in pairs.T]
    value = max((one.value or 0.0 for one in found), key=abs)
    lows, highs = [one.low for one in found if one.low is not None], [one.high for one in found if one.high is not None]
    return Estimate(value=value, low=min(lows, default=None), high=max(highs, default=None))
