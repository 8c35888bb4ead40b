"""Run the parts of the check, each in its process, and compare precisions."""

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
from megatron_dypo.planning.devices import GPUS, Gpu
from tools.gpu_parts.logprob_speed import ProjectionSizes
from tools.gpu_parts.synthetic import CheckSizes

LOSS_BAR, SPEED_BAR = 0.01, 1.25
Part = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Types of one series of updates."""

    name: str
    dtype: str
    recipe: str = "none"


_ROOT = Path(__file__).resolve().parents[2]


class PartError(RuntimeError):
    """A part ended with an error; the message is the last line that it wrote."""


def run_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A part in a process of its own.

    Raises:
        PartError: it failed.
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
    """Those that the machine can run, the first of them the one that others are held against."""
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
    """Everything that is written to the result file; a part that fails leaves its ``error`` there and stops no other.

    Args:
        work: folder for what precisions are compared by: two bytes a parameter each.
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
    """Of losses and time. Gaps are relative to the reference's loss at the same update."""
    pairs = zip(reference["losses"], result["losses"], strict=True)
    gaps = [abs(own - other) / max(abs(other), 1e-12) for other, own in pairs]
    return {
        "loss_gap_max": max(gaps),
        "loss_gap_mean": sum(gaps) / len(gaps),
        "speed": reference["step_s"] / result["step_s"],
        "memory": result["peak_gib"] / reference["peak_gib"],
    }


def compare_tensors(reference: Mapping[str, torch.Tensor], result: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Cosine of the first update's gradients; mean and largest gap of the scoring pass's log-probs, in nats."""
    own, other = result["gradient"].float(), reference["gradient"].float()
    cosine = torch.dot(own, other) / (own.norm() * other.norm())
    gap_N = (result["logp"] - reference["logp"]).abs()
    return {
        "gradient_cosine": float(cosine),
        "score_gap_mean": float(gap_N.mean()),
        "score_gap_max": float(gap_N.max()),
    }


def verdicts(series: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """Bar → whether it is met, for each precision that was held against another; and that each ran at all."""
    met = {}
    for name, result in series.items():
        met[f"{name} runs"] = "error" not in result
        if "against" in result:
            met[f"{name}: loss within {LOSS_BAR:.0%}"] = result["against"]["loss_gap_max"] <= LOSS_BAR
            if name.startswith("fp8"):
                met[f"{name}: step {SPEED_BAR} times as fast"] = result["against"]["speed"] >= SPEED_BAR
    return met


def find_rates(device: str) -> Gpu | None:
    """The data sheet of a device by the name that its driver gives; None if there is none."""
    words = device.lower().replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words), None)


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
