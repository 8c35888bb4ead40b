"""Write a plan as text for people."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_dypo.planning.devices import GIB
from megatron_dypo.planning.footprint import Footprint, fullest
from megatron_dypo.planning.intervals import SPREADS, interval
from megatron_dypo.planning.parameters import whole_model
from megatron_dypo.planning.plan import REMEDIES, Plan
from megatron_dypo.planning.scaling import Scaled

_RULE = "-" * 118


def render(plan: Plan) -> str:
    """Return the report as text that ends with a newline. Its last lines are the verdict."""
    parts = (
        _setting(plan),
        _memory(plan),
        _step(plan),
        _probe(plan),
        _division(plan),
        _scaling(plan.scaling, plan.step.is_async),
        _verdict(plan),
    )
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _setting(plan: Plan) -> list[str]:
    setting, cfg = plan.setting, plan.setting.config
    parallel, assumed = cfg.parallel, setting.assumed
    axes = f"TP {parallel.tensor} × PP {parallel.pipeline} × CP {parallel.context} × DP {setting.data}"
    layers = setting.mesh.stage_layers(setting.arch.num_layers)
    extras = [
        f"EP {parallel.expert}" if parallel.expert > 1 else "",
        f"{parallel.virtual_pipeline} chunks a stage" if parallel.virtual_pipeline else "",
        "sequence parallel" if parallel.sequence else "",
        f"stages of {', '.join(map(str, layers))} layers" if len(set(layers)) > 1 else "",
    ]
    size = whole_model(setting.arch).total
    servers = cfg.rollout.servers
    return [
        f"{cfg.model.hf_path}: {setting.arch.family}, {size / 1e9:.2f}e9 parameters, {_types(plan)}",
        f"{setting.gpu.name}, {setting.gpu.memory / GIB:.1f} GiB",
        f"trainer  {_nodes(plan, setting.trainer_gpus)}: {', '.join(filter(None, [axes, *extras]))}",
        f"servers  {_nodes(plan, setting.rollout_gpus)}: {setting.num_servers} × TP {servers.tensor_parallel}"
        + ("" if cfg.refit.quantize == "none" else f", linear weights in {cfg.refit.quantize}"),
        f"update   {setting.sequences_per_update:,.0f} sequences of {setting.sequence_tokens:,} tokens, "
        f"{setting.microbatches} rows a replica, the longest of {setting.row_tokens:,} tokens",
        f"assumed  prompts of {assumed.prompt_tokens:,} and responses of {assumed.response_tokens:,} tokens on "
        f"average; {assumed.easy:.0%} of prompts Easy, {setting.mid:.0%} Mid, {assumed.hard:.0%} Hard",
    ]


def _types(plan: Plan) -> str:
    """Return the data types of the policy in training, as text."""
    model = plan.setting.config.model
    if not model.fp8.is_on:
        return model.dtype
    return f"{model.dtype}, linear layers in FP8 ({model.fp8.recipe}{', gathered' if model.fp8.param_gather else ''})"


def _nodes(plan: Plan, gpus: int) -> str:
    per_node = plan.setting.gpus_per_node
    nodes = (
        f"{gpus // per_node} nodes × {per_node} GPUs" if gpus >= per_node and gpus % per_node == 0 else f"{gpus} GPUs"
    )
    return nodes.replace("1 nodes", "1 node") if gpus == per_node else nodes


def _memory(plan: Plan) -> list[str]:
    lines = ["MEMORY of one GPU, GiB"]
    shown = _distinct(plan.stages)
    for footprint in (*shown, plan.server):
        mark = "  <- tightest" if footprint is plan.tightest else ""
        lines += [_RULE, f"{footprint.where}{mark}"]
        lines += [f"  {term.name:<15}{term.bytes / GIB:>9.2f}   {term.why}" for term in footprint.terms]
        state = "spare" if footprint.spare >= 0 else "TOO MUCH"
        lines.append(
            f"  {'total':<15}{footprint.total / GIB:>9.2f}   of {footprint.capacity / GIB:.1f}: "
            f"{abs(footprint.spare) / GIB:.2f} {state}"
        )
    lines.append(_RULE)
    if plan.reference:
        lines.append(f"host memory of a trainer node: {plan.reference / GIB:.1f} GiB, pinned, for the reference policy")
    return lines


def _distinct(stages: tuple[Footprint, ...]) -> list[Footprint]:
    """Return the first, the last and the fullest stage, in pipeline order."""
    tightest = fullest(list(stages))
    return [stage for i, stage in enumerate(stages) if i in (0, len(stages) - 1) or stage is tightest]


def _step(plan: Plan) -> list[str]:
    step, setting = plan.step, plan.setting
    gpus = setting.gpus
    aborted = f" and {step.aborted:,.0f} aborted" if step.aborted else ""
    waits = ("beside log-probs and update", "beside rollouts") if step.is_async else ("trainer waits", "servers wait")
    parts = {
        "rollout": (step.rollout, f"{step.generated:,.0f} tokens sampled{aborted}; {waits[0]}"),
        "log-probs": (step.logprobs, "log π_old" + (" and log π_ref" if plan.reference else "")),
        "update": (step.update.total, f"MFU {step.mfu:.0%}; {waits[1]}"),
        "refit": (step.refit, f"transport {setting.config.refit.transport}"),
        "switch": (step.switch, "servers on the trainer's GPUs sleep and wake"),
        "checkpoint": (step.checkpoint, f"one every {setting.config.checkpoint.every} steps"),
        "loop": (step.loop, "data, grading, advantages, logs"),
    }
    lines = ["TIME of one optimizer step, s                     (nine of ten published runs are within)"]
    for name, (seconds, why) in parts.items():
        if not seconds and name in ("switch", "checkpoint"):
            continue
        part = name.replace("-", "")
        bounds = _bounds(seconds, part if part in SPREADS else "common")
        lines.append(f"  {name:<15}{seconds:>9.1f}   {bounds:<17}{seconds / step.total:>4.0%}   {why}")
        if name == "update":
            lines += [f"    {axis:<13}{value:>9.1f}" for axis, value in vars(step.update).items() if value >= 0.05]
    how, seconds = (
        ("one part after the other", step.sequential)
        if step.is_async
        else ("with rollouts beside the update", step.overlapped)
    )
    other = f"{how} {seconds:.1f} s {_bounds(seconds, 'step')}"
    lines.append(
        f"  {'total':<15}{step.total:>9.1f}   {_bounds(step.total, 'step'):<24}"
        f"{step.tokens / step.total:,.0f} trained tokens/s, {step.tokens / step.total / gpus:,.0f} a GPU; {other}"
    )
    how = "rollouts beside the update" if step.is_async else "one after the other"
    if setting.is_colocated:
        return lines
    lines.append(f"  idle: trainer {step.trainer_idle:.0%}, servers {step.rollout_idle:.0%} ({how})")
    return lines


def _bounds(seconds: float, part: str) -> str:
    low, high = interval(seconds, part)
    return f"({low:.1f} – {high:.1f})"


def _probe(plan: Plan) -> list[str]:
    cfg, cost, step = plan.setting.config, plan.probe, plan.step
    scored = _bounds(cost.scores, "update")
    every = f", every {cfg.probe.every} steps" if cfg.probe.every else ""
    return [
        f"PROBE of {cfg.probe.prompts} prompts × {cfg.probe.repeats} × {cfg.rollout.group_size} rollouts and their "
        f"traces{every}",
        f"  {'rollout':<15}{cost.rollout:>9.1f}   s {_bounds(cost.rollout, 'rollout')}",
        f"  {'scores':<15}{cost.scores:>9.1f}   s {scored} for {cost.trajectories:,} trajectories, "
        f"or {cost.scores / step.total:.1f} steps; {cost.scores / cost.update:.2f} of updates from one trajectory each",
        f"  {'memory':<15}{cost.device_bytes / GIB:>9.2f}   GiB on a GPU, for any number of trajectories; "
        f"{cost.host_bytes / GIB:.2f} GiB on the host of the first rank, for these",
    ]


def _division(plan: Plan) -> list[str]:
    lines = ["DIVISION of the same GPUs between trainer and servers"]
    if plan.setting.is_colocated:
        return [*lines, "  none: they share all GPUs (refit.offload_servers)"]
    rows = [("synchronous", plan.synchronous), ("overlapped", plan.balanced)]
    for name, split in reversed(rows) if plan.step.is_async else rows:
        if split is None:
            lines.append(f"  {name:<15}no division of these GPUs fits")
            continue
        seconds = split.time.sequential if name == "synchronous" else split.time.overlapped
        bounds = _bounds(seconds, "step")
        ratio = split.trainer_gpus / split.rollout_gpus
        lines.append(
            f"  {name:<15}{_nodes(plan, split.trainer_gpus)} train, {_nodes(plan, split.rollout_gpus)} serve "
            f"({ratio:.2g} : 1): {seconds:.1f} s {bounds} a step"
        )
    return lines


def _scaling(rows: Iterable[Scaled], is_async: bool) -> list[str]:
    how = "rollouts beside the update" if is_async else "one part after the other"
    lines = [
        f"WEAK SCALING: prompts, replicas and servers in proportion, {how}; parts have the factors of TIME's intervals",
        f"  {'GPUs':>6}{'trainer':>9}{'servers':>9}{'rollout s':>11}{'logp s':>9}{'update s':>10}{'refit s':>9}"
        f"{'step s':>9}{'':19}{'tokens/s':>10}{'efficiency':>12}",
    ]
    for row in rows:
        if row.split is None:
            lines.append(f"  {row.gpus:>6}   too few for one copy of the axes and one server")
            continue
        time = row.split.time
        lines.append(
            f"  {row.gpus:>6}{row.split.trainer_gpus:>9}{row.split.rollout_gpus:>9}{time.rollout:>11.1f}"
            f"{time.logprobs:>9.1f}{time.update.total:>10.1f}{time.refit:>9.1f}{time.total:>9.1f}"
            f"  {_bounds(time.total, 'step'):<17}{time.tokens / time.total:>10,.0f}{row.efficiency:>12.0%}"
        )
    return lines


def _verdict(plan: Plan) -> list[str]:
    if plan.problems():
        return [
            *(f"CANNOT RUN: {obstacle}" for obstacle in plan.obstacles()),
            *(f"DOES NOT FIT: {misfit}" for misfit in plan.misfits()),
        ]
    tightest = plan.tightest
    largest = tightest.largest
    return [
        f"FITS. Tightest: {tightest.where}, {tightest.room / GIB:.1f} GiB to spare; its largest term is {largest.name} "
        f"with {largest.bytes / GIB:.1f} GiB.",
        f"For more room: {REMEDIES[largest.name]}.",
    ]
