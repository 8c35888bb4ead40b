"""Which stages a machine gets, in which order, and with which sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.gpu_parts.layouts import compare_layouts
from tools.gpu_parts.logprob_speed import ProjectionSizes
from tools.gpu_parts.memory import compare_memory
from tools.gpu_parts.precisions import run_precisions
from tools.gpu_parts.resumed import compare_resumed
from tools.gpu_parts.run_part import run_part
from tools.gpu_parts.stages import LIMIT_S, Result, Stage
from tools.gpu_parts.synthetic import CheckSizes, Dtype
from tools.gpu_parts.training import Trainer, lose_a_server, refit_by_every_transport, short_quickstart

AGREEMENT_BAR = 1e-3
"""Largest difference of the mean log-prob, in nats."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The machine, and what the check does on it."""

    machine: Mapping[str, Any]
    folder: Path
    sizes: CheckSizes
    projection: ProjectionSizes
    overrides: tuple[str, ...] = ()
    """Config fields of all runs with servers, as ``field=value``."""
    is_smoke: bool

    @property
    def dtype(self) -> Dtype:
        return "bfloat16" if self.machine["on_gpu"] else "float32"

    @property
    def num_gpus(self) -> int:
        return int(self.machine["num_gpus"])

    @property
    def work(self) -> Path:
        """Return the folder of models and runs, which must exist."""
        work = self.folder / "work"
        work.mkdir(parents=True, exist_ok=True)
        return work

    @property
    def trainer(self) -> Trainer:
        return Trainer(
            work=self.work,
            dtype=self.dtype,
            num_gpus=self.num_gpus,
            warmup_steps=60 if self.is_smoke else 900,
            steps=2 if self.is_smoke else 10,
            limit_s=LIMIT_S,
            overrides=self.overrides,
        )


def plan_stages(plan: Plan, say: Callable[[str], None]) -> list[Stage]:
    """Return the stages in order. Each later one needs more parts of the machine to work."""
    return [
        Stage(name="environment", about="device, libraries, and what they lack", run=lambda: environment(plan)),
        Stage(
            name="kernels",
            about="fused log-probs against eager logits, Megatron's fused cross-entropy and Liger",
            run=lambda: kernels(plan),
        ),
        Stage(
            name="updates",
            about="bf16 and FP8 against fp32",
            run=lambda: run_precisions(plan.machine, plan.sizes, plan.work, say=say),
        ),
        Stage(
            name="memory",
            about="peak of the updates against `megatron-dypo plan`",
            run=lambda: compare_memory(plan.machine, plan.sizes, plan.folder / "updates.json"),
        ),
        Stage(
            name="resumed",
            about="updates after a checkpoint was loaded against those without, in each precision",
            run=lambda: compare_resumed(plan.machine, plan.work),
        ),
        Stage(
            name="quickstart",
            about="a server and a rank on one device: a few steps of DYPO",
            run=lambda: short_quickstart(plan.trainer),
        ),
        Stage(
            name="transports",
            about="refits of a running server by each transport, all bytes checked",
            run=lambda: refit_by_every_transport(plan.trainer),
        ),
        Stage(
            name="layouts",
            about="gradients of two ranks against those of one, in each layout",
            run=lambda: with_two(plan, lambda: compare_layouts(plan.work, plan.dtype)),
        ),
        Stage(
            name="lost_server",
            about="a server is killed; the run refits its successor over new links",
            run=lambda: with_two(plan, lambda: lose_a_server(plan.trainer)),
        ),
    ]


def environment(plan: Plan) -> Result:
    """Return the machine's facts."""
    machine = dict(plan.machine)
    is_expected = bool(machine["on_gpu"]) or plan.is_smoke
    return {"machine": machine, "verdicts": {"torch sees a GPU" if not plan.is_smoke else "smoke": is_expected}}


def kernels(plan: Plan) -> Result:
    """Measure log-probs; on a GPU they must also be cheaper than eager logits."""
    found = run_part({"what": "logprobs", "sizes": asdict(plan.projection), "dtype": plan.dtype}, limit_s=LIMIT_S)
    fused, eager = found["fused"], found["eager"]
    verdicts = {"fused runs": "seconds" in fused}
    others = [name for name in ("eager", "megatron", "liger") if "seconds" in found.get(name, {})]
    for name in others:
        is_near = abs(found[name]["mean_logp"] - fused["mean_logp"]) <= AGREEMENT_BAR
        verdicts[f"fused agrees with {name}"] = is_near
    if plan.machine["on_gpu"] and "seconds" in eager:
        verdicts["fused takes at most half of eager's memory"] = fused["peak_gib"] <= eager["peak_gib"] / 2
        verdicts["fused takes at most 1.1 of eager's time"] = fused["seconds"] <= 1.1 * eager["seconds"]
    return {"logprobs": found, "verdicts": verdicts}


def with_two(plan: Plan, run: Callable[[], Result]) -> Result:
    """Run a stage that needs two devices, which a CPU always has."""
    if plan.machine["on_gpu"] and plan.num_gpus < 2:
        return {"skipped": "needs two GPUs", "verdicts": {}}
    return run()
