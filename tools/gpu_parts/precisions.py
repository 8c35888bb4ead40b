"""Updates in each precision, each in a process of its own, and their comparison with the first precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dypo.planning.devices import find_rates
from tools.gpu_parts.run_part import Part, PartError, run_part
from tools.gpu_parts.synthetic import CheckSizes

LOSS_BAR, SPEED_BAR = 0.01, 1.25


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Data types of one series of updates."""

    name: str
    dtype: str
    recipe: str = "none"


def precisions(machine: Mapping[str, Any]) -> list[Precision]:
    """Return the precisions that the machine can run. The others are compared with the first."""
    float32 = Precision(name="float32", dtype="float32")
    if not machine["on_gpu"]:
        return [float32, Precision(name="bf16", dtype="bfloat16")]
    recipes = [r for r in ("delayed", "tensorwise", "blockwise", "mxfp8") if r not in machine["fp8_obstacles"]]
    fp8 = [Precision(name=f"fp8_{recipe}", dtype="bfloat16", recipe=recipe) for recipe in recipes]
    return [float32, Precision(name="bf16", dtype="bfloat16"), *fp8]


def run_precisions(
    machine: Mapping[str, Any],
    sizes: CheckSizes,
    work: Path,
    *,
    run_part: Part = run_part,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return ``updates`` (precision → its numbers) and ``verdicts``.

    A precision that fails leaves its ``error`` there; the others go on.

    Args:
        work: folder for the tensors by which precisions are compared: two bytes for each parameter and precision.
    """
    series: dict[str, dict[str, Any]] = {}
    chosen = precisions(machine)
    for precision in chosen:
        spec = {"what": "updates", "sizes": asdict(sizes), "dtype": precision.dtype, "recipe": precision.recipe}
        series[precision.name] = _try(run_part, {**spec, "keep": str(work / precision.name)})
        say(f"  {precision.name}: {_summary(series[precision.name])}")
    reference = chosen[0].name
    gpu = find_rates(machine["device"])
    for precision in chosen:
        result = series[precision.name]
        if "error" in result:
            continue
        result["mfu"] = result["model_flops_per_s"] / gpu.bf16 if gpu else None
        if precision.name != reference and "error" not in series[reference]:
            result["against"] = {"reference": reference, **compare(series[reference], result)}
            kept = [torch.load(work / name, weights_only=True) for name in (reference, precision.name)]
            result["against"] |= compare_tensors(*kept)
            if precision.name.startswith("fp8") and "error" not in series["bf16"]:
                result["speed_of_bf16"] = series["bf16"]["step_s"] / result["step_s"]
    return {
        "bf16_peak_flops_per_s": gpu.bf16 if gpu else None,
        "updates": series,
        "verdicts": verdicts(series),
    }


def compare(reference: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, float]:
    """Compare losses, time and memory. Gaps are relative to the reference's loss at the same update."""
    pairs = zip(reference["losses"], result["losses"], strict=True)
    gaps = [abs(own - other) / max(abs(other), 1e-12) for other, own in pairs]
    return {
        "loss_gap_max": max(gaps),
        "loss_gap_mean": sum(gaps) / len(gaps),
        "speed": reference["step_s"] / result["step_s"],
        "memory": result["peak_gib"] / reference["peak_gib"],
    }


def compare_tensors(reference: Mapping[str, torch.Tensor], result: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the cosine of the first update's gradients, and the mean and largest gap of log-probs in nats."""
    own, other = result["gradient"].float(), reference["gradient"].float()
    cosine = torch.dot(own, other) / (own.norm() * other.norm())
    gap_N = (result["logp"] - reference["logp"]).abs()
    return {
        "gradient_cosine": float(cosine),
        "score_gap_mean": float(gap_N.mean()),
        "score_gap_max": float(gap_N.max()),
    }


def verdicts(series: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """Return bar → whether it is met: each precision runs, and those that are compared meet loss and speed."""
    met = {}
    for name, result in series.items():
        met[f"{name} runs"] = "error" not in result
        if "against" in result:
            met[f"{name}: loss within {LOSS_BAR:.0%}"] = result["against"]["loss_gap_max"] <= LOSS_BAR
        if "speed_of_bf16" in result:
            met[f"{name}: step {SPEED_BAR} times as fast as in bf16"] = result["speed_of_bf16"] >= SPEED_BAR
    return met


def _try(run_part: Part, spec: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return run_part(spec)
    except PartError as error:
        return {"error": str(error)}


def _summary(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    return f"{result['step_s']:.4g} s a step, {result['tokens_per_s']:.4g} tokens/s, peak {result['peak_gib']:.3g} GiB"
