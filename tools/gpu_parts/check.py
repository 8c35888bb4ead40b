"""Run the parts of the GPU check, each in a process of its own, and compare precisions."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dypo.metrics.versions import collect_versions
from megatron_dypo.planning.devices import find_rates
from tools.gpu_parts.logprob_speed import ProjectionSizes
from tools.gpu_parts.synthetic import CheckSizes

LOSS_BAR, SPEED_BAR = 0.01, 1.25
Part = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Data types of one series of updates."""

    name: str
    dtype: str
    recipe: str = "none"


_ROOT = Path(__file__).resolve().parents[2]


class PartError(RuntimeError):
    """The failure of a part; the message is the last line that the part wrote."""


def run_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run a part in a process of its own, and return its result.

    Raises:
        PartError: the part failed.
    """
    command = [sys.executable, "-m", "tools.gpu_parts.part", json.dumps(spec)]
    paths = [str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.stderr.write(done.stderr)
        lines = done.stderr.strip().splitlines()
        raise PartError(lines[-1] if lines else f"exit code {done.returncode}")
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def precisions(machine: Mapping[str, Any]) -> list[Precision]:
    """Return the precisions that the machine can run. The others are compared with the first."""
    if not machine["on_gpu"]:
        return [Precision(name="float32", dtype="float32"), Precision(name="bf16", dtype="bfloat16")]
    recipes = [r for r in ("delayed", "tensorwise", "blockwise", "mxfp8") if r not in machine["fp8_obstacles"]]
    fp8 = [Precision(name=f"fp8_{recipe}", dtype="bfloat16", recipe=recipe) for recipe in recipes]
    return [Precision(name="bf16", dtype="bfloat16"), *fp8]


def run_check(
    machine: Mapping[str, Any],
    sizes: CheckSizes,
    projection: ProjectionSizes,
    work: Path,
    *,
    run_part: Part = run_part,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return the content of the result file. A part that fails leaves its ``error`` there; the other parts go on.

    Args:
        work: folder for the tensors by which precisions are compared: two bytes for each parameter and precision.
    """
    series: dict[str, dict[str, Any]] = {}
    chosen = precisions(machine)
    for precision in chosen:
        spec = {"what": "updates", "sizes": asdict(sizes), "dtype": precision.dtype, "recipe": precision.recipe}
        series[precision.name] = _try(run_part, {**spec, "keep": str(work / precision.name)})
        say(f"{precision.name}: {_summary(series[precision.name])}")
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
    dtype = "bfloat16" if machine["on_gpu"] else "float32"
    logprobs = _try(run_part, {"what": "logprobs", "sizes": asdict(projection), "dtype": dtype})
    say(f"fused log-probs: {_summary(logprobs)}")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "versions": collect_versions(),
        "sizes": {"updates": asdict(sizes), "logprobs": asdict(projection)},
        "bf16_peak_flops_per_s": gpu.bf16 if gpu else None,
        "updates": series,
        "logprobs": logprobs,
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
            if name.startswith("fp8"):
                met[f"{name}: step {SPEED_BAR} times as fast"] = result["against"]["speed"] >= SPEED_BAR
    return met


def _try(run_part: Part, spec: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return run_part(spec)
    except PartError as error:
        return {"error": str(error)}


def _summary(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    if "fused" in result:
        times = [f"{name} {result[name].get('seconds', float('nan')):.4g} s" for name in ("fused", "eager", "megatron")]
        return f"{', '.join(times)}; {result['share_of_product_limit']:.0%} of the products' limit"
    return f"{result['step_s']:.4g} s a step, {result['tokens_per_s']:.4g} tokens/s, peak {result['peak_gib']:.3g} GiB"
