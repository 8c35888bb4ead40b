"""A whole plan: whether a run fits, how long a step takes, and how to divide the GPUs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_dypo.config.fp8 import CAPABILITIES, missing_capability
from megatron_dypo.planning.devices import GPUS
from megatron_dypo.planning.footprint import Footprint, fullest
from megatron_dypo.planning.intervals import interval
from megatron_dypo.planning.memory import reference_bytes, trainer_footprints
from megatron_dypo.planning.probe import ProbeCost, probe_cost
from megatron_dypo.planning.scaling import Scaled, Split, best_split, splits, weak_scaling
from megatron_dypo.planning.serving import server_footprint
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.step import StepTime, reads_reference, step_time

REMEDIES = {
    "parameters": "a larger parallel.tensor or parallel.pipeline (experts: parallel.expert)",
    "FP8 weights": "model.fp8.param_gather=true, or a larger parallel.tensor or parallel.pipeline "
    "(experts: parallel.expert)",
    "gradients": "a larger parallel.tensor or parallel.pipeline (experts: parallel.expert)",
    "optimizer": "more replicas with optimizer.distributed=true, or a larger parallel.tensor or parallel.pipeline",
    "activations": "model.recompute=full, parallel.sequence=true, a larger parallel.context or parallel.tensor, "
    "or a smaller batching.tokens_per_microbatch",
    "working set": "a larger parallel.context or parallel.tensor, or a smaller batching.tokens_per_microbatch",
    "gather buffer": "a larger parallel.context, or a smaller batching.tokens_per_microbatch",
    "rows": "more replicas, or a smaller batching.prompts_per_update",
    "weights": "a larger rollout.servers.tensor_parallel",
    "KV cache": "a larger rollout.servers.tensor_parallel or mem_fraction, or a smaller rollout.max_new_tokens",
    "trainer": "servers on GPUs of their own, or a larger parallel.tensor or parallel.pipeline",
    "refit bucket": "a smaller refit.bucket_mib",
    "reserved": "a GPU with more memory",
    "fragmentation": "less of the terms above it",
}
"""Name of a memory term → settings that make it smaller."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All figures of the report."""

    setting: Setting
    stages: tuple[Footprint, ...]
    """Memory of a trainer rank in each pipeline stage, first to last."""
    server: Footprint
    reference: float
    """Bytes of host memory on each trainer node for π_ref; 0: π_ref needs no weights of its own."""
    step: StepTime
    probe: ProbeCost
    balanced: Split | None
    """Best division of the same GPUs for sampling rollouts during the update; None: no division fits."""
    synchronous: Split | None
    """Best division for rollout and update one after the other; None: no division fits."""
    scaling: tuple[Scaled, ...]

    @property
    def tightest(self) -> Footprint:
        return fullest([*self.stages, self.server])

    @property
    def fits(self) -> bool:
        return self.tightest.spare >= 0

    def misfits(self) -> list[str]:
        """Return one line for each role that does not fit: by how much, the largest term, and what to change."""
        return [misfit(footprint) for footprint in (fullest(list(self.stages)), self.server) if footprint.spare < 0]

    def obstacles(self) -> list[str]:
        """Return a line if the GPU cannot run the config's FP8 recipe."""
        obstacle = fp8_obstacle(self.setting)
        return [] if obstacle is None else [obstacle]

    def problems(self) -> list[str]:
        """Return the reasons why the run is impossible; empty: it is possible."""
        return [*self.obstacles(), *self.misfits()]


def make_plan(setting: Setting) -> Plan:
    """Make the plan of a setting. It takes about a second."""
    can_divide = bool(splits(setting))
    return Plan(
        setting=setting,
        stages=tuple(trainer_footprints(setting)),
        server=server_footprint(setting),
        reference=reference_bytes(setting) if reads_reference(setting) else 0.0,
        step=step_time(setting),
        probe=probe_cost(setting),
        balanced=best_split(setting, overlapped=True) if can_divide else None,
        synchronous=best_split(setting, overlapped=False) if can_divide else None,
        scaling=tuple(weak_scaling(setting)),
    )


def fp8_obstacle(setting: Setting) -> str | None:
    """Say what the GPU lacks for ``model.fp8.recipe``, and which GPUs have it; None: nothing."""
    gpu, recipe = setting.gpu, setting.config.model.fp8.recipe
    missing = missing_capability(recipe, gpu.capability)
    if missing is None:
        return None
    able = ", ".join(name for name, other in GPUS.items() if missing_capability(recipe, other.capability) is None)
    lack = "it has no FP8" if gpu.fp8 is None else f"it is not {CAPABILITIES[recipe].generation}"
    return f"model.fp8.recipe={recipe} on {gpu.name}: needs {missing}: {lack}; those that can: {able}"


def misfit(footprint: Footprint) -> str:
    """Say what is too large, and what to do about it."""
    largest, gib = footprint.largest, 2**30
    return (
        f"{footprint.where}: {footprint.total / gib:.1f} GiB do not fit into {footprint.capacity / gib:.1f} GiB; the "
        f"largest term is {largest.name} with {largest.bytes / gib:.1f} GiB ({largest.why}): "
        f"try {REMEDIES[largest.name]}"
    )


def as_data(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data: bytes, seconds and GPUs."""
    setting, step = plan.setting, plan.step
    return {
        "gpu": setting.gpu.name,
        "trainer_gpus": setting.trainer_gpus,
        "rollout_gpus": setting.rollout_gpus,
        "data_parallel": setting.data,
        "microbatches": setting.microbatches,
        "fits": plan.fits,
        "mode": setting.config.rollout.mode,
        "problems": plan.problems(),
        "memory_bytes": [_memory(footprint) for footprint in (*plan.stages, plan.server)],
        "host_bytes_per_node": {"reference": plan.reference},
        "step": _step(step),
        "probe": asdict(plan.probe),
        "best_split": {
            name: None if split is None else {"trainer_gpus": split.trainer_gpus, "rollout_gpus": split.rollout_gpus}
            for name, split in (("overlapped", plan.balanced), ("synchronous", plan.synchronous))
        },
        "weak_scaling": [
            {"gpus": row.gpus} | ({"efficiency": row.efficiency, **_step(row.split.time)} if row.split else {})
            for row in plan.scaling
        ],
    }


def _memory(footprint: Footprint) -> dict[str, Any]:
    return {
        "where": footprint.where,
        "capacity": footprint.capacity,
        "total": footprint.total,
        "terms": {term.name: term.bytes for term in footprint.terms},
    }


def _step(step: StepTime) -> dict[str, float]:
    return {
        "total_s": step.total,
        "sequential_s": step.sequential,
        "overlapped_s": step.overlapped,
        "rollout_s": step.rollout,
        "logprobs_s": step.logprobs,
        "update_s": step.update.total,
        "refit_s": step.refit,
        "switch_s": step.switch,
        "checkpoint_s": step.checkpoint,
        "loop_s": step.loop,
        "total_low_s": interval(step.total, "step")[0],
        "total_high_s": interval(step.total, "step")[1],
        "trainer_idle": step.trainer_idle,
        "rollout_idle": step.rollout_idle,
        "tokens": step.tokens,
        "aborted_tokens": step.aborted,
        "mfu": step.mfu,
    }
