"""Propose layouts of a trainer and its servers for a number of nodes. Pure arithmetic.

The trainer's seconds depend on its nodes and layout, the rollouts' on the servers' nodes and tensor parallelism. So
each side's best is found for each number of its nodes, and then the best divisions of all nodes. Only layouts that
leave a tenth of the memory free are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_dypo.checks import require
from megatron_dypo.config.tree import Config
from megatron_dypo.planning.footprint import fullest
from megatron_dypo.planning.layouts import Recompute, end_stages, layouts
from megatron_dypo.planning.memory import trainer_footprints
from megatron_dypo.planning.rollouts import rollout_round
from megatron_dypo.planning.serving import make_server, server_footprint
from megatron_dypo.planning.setting import Setting
from megatron_dypo.planning.step import StepTime, step_time, trainer_seconds

FREE = 0.1
"""Share of a GPU's memory that a proposal leaves free."""
_MOST_DIVISIONS = 16
_SERVER_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A layout of all nodes."""

    setting: Setting
    trainer_nodes: int
    server_nodes: int
    time: StepTime
    why: str
    """The reasons in a line: what its neighbours would cost."""


def search(setting: Setting, nodes: int, *, count: int = 3) -> list[Proposal]:
    """Return the ``count`` best proposals, each with another division of the nodes, the fastest first.

    Raises:
        ValueError: too few nodes, servers on the trainer's GPUs, or nothing fits.
    """
    require(nodes >= 2, f"nodes={nodes}", "a search needs at least 2: some train, others serve")
    require(
        not setting.is_colocated,
        "refit.offload_servers=true",
        "a search divides nodes between trainer and servers; these share theirs",
    )
    found = []
    for trainer_nodes in _divisions(nodes):
        served = _best_servers(setting, nodes - trainer_nodes)
        trained = None if served is None else _best_layout(served, trainer_nodes)
        if trained is not None:
            found.append((_with_flight(trained), trainer_nodes))
    require(bool(found), f"nodes={nodes}", f"no layout leaves {FREE:.0%} of the memory of a {setting.gpu.name} free")
    found.sort(key=lambda pair: step_time(pair[0]).total)
    return [
        Proposal(
            setting=best,
            trainer_nodes=trainer_nodes,
            server_nodes=nodes - trainer_nodes,
            time=step_time(best),
            why=_reasons(best, nodes),
        )
        for best, trainer_nodes in found[:count]
    ]


def _divisions(nodes: int) -> list[int]:
    """Return numbers of trainer nodes to try, at most ``_MOST_DIVISIONS`` of them, evenly spread."""
    every = -(-(nodes - 1) // _MOST_DIVISIONS)
    return list(range(every, nodes, every))


def _best_servers(setting: Setting, nodes: int) -> Setting | None:
    """Return the setting with the servers that sample a round soonest on ``nodes`` nodes; None: none fits."""
    able = [made for size in _SERVER_SIZES if (made := _with_servers(setting, nodes, size)) is not None]
    return min(able, key=lambda made: rollout_round(_with_flight(made)).seconds, default=None)


def _with_servers(setting: Setting, nodes: int, size: int) -> Setting | None:
    per_node = setting.gpus_per_node
    span = max(1, size // per_node)
    copies = setting.server_mesh.attention_data
    if (size > per_node and size % per_node) or nodes % span:
        return None
    if size % copies or setting.arch.num_attention_heads % (size // copies):
        return None
    servers = dataclasses.replace(
        setting.config.rollout.servers,
        urls=(),
        router=None,
        urls_are_restarted=False,
        nodes=nodes,
        per_node=max(1, per_node // size),
        tensor_parallel=size,
    )
    rollout = dataclasses.replace(setting.config.rollout, servers=servers)
    config = dataclasses.replace(setting.config, rollout=rollout)
    made = dataclasses.replace(setting, config=config, num_servers=servers.num_servers(per_node))
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    fits = server_footprint(made).spare >= 0 and make_server(made).kv_tokens_per_copy >= longest
    return made if fits else None


def _best_layout(setting: Setting, nodes: int) -> Setting | None:
    """Return the setting with the fastest trainer on ``nodes`` nodes that fits; None: none does."""
    gpus = nodes * setting.gpus_per_node
    best, seconds = None, float("inf")
    for config in layouts(setting, gpus):
        made = dataclasses.replace(setting, config=config, trainer_gpus=gpus)
        taken = trainer_seconds(made)
        if taken < seconds and _fits(made):
            best, seconds = made, taken
    return best


def _fits(setting: Setting) -> bool:
    return fullest(trainer_footprints(setting)).spare >= FREE * setting.gpu.memory


def _with_flight(setting: Setting) -> Setting:
    """Return the setting with as many open requests as a round has, so that the servers' memory is the only limit."""
    cfg = setting.config
    wanted = cfg.rollout.prompts_per_round * max(1, setting.group.rollouts) * cfg.rollout.oversample
    rollout = dataclasses.replace(cfg.rollout, max_in_flight=max(1, round(-(-wanted // setting.data))))
    return dataclasses.replace(setting, config=dataclasses.replace(cfg, rollout=rollout))


def _reasons(best: Setting, nodes: int) -> str:
    """Say what the proposal's neighbours would cost: half of each axis, other recomputation, other servers."""
    cfg, total = best.config, step_time(best).total
    parallel = cfg.parallel
    reasons = []
    for name in ("tensor", "pipeline", "context", "expert"):
        size = getattr(parallel, name)
        reasons += [_of_layout(best, total, f"{name} {size // 2}", name, size // 2)] if size > 1 else []
        if name == "tensor" and size < best.gpus_per_node:
            reasons.append(_of_layout(best, total, f"{name} {size * 2}", name, size * 2))
    other: Recompute = "full" if cfg.model.recompute == "none" else "none"
    reasons.append(_compare(total, f"recompute {other}", lambda: _recomputing(best, other)))
    size = cfg.rollout.servers.tensor_parallel
    for changed in (size // 2, size * 2):
        if changed in _SERVER_SIZES:
            servers = nodes - best.trainer_gpus // best.gpus_per_node
            reasons.append(_compare(total, f"servers of {changed}", partial(_with_servers, best, servers, changed)))
    return "; ".join(reasons)


def _of_layout(best: Setting, total: float, label: str, name: str, size: int) -> str:
    return _compare(total, label, lambda: _with_axis(best, name, size))


def _compare(total: float, label: str, make: Callable[[], Setting | None]) -> str:
    try:
        made = make()
        if made is None or not _fits(made):
            return f"{label} does not fit"
        return f"{label} {step_time(_with_flight(made)).total / total - 1:+.0%}"
    except ValueError:
        return f"{label} is impossible"


def _with_axis(best: Setting, name: str, size: int) -> Setting:
    cfg = best.config
    changes: dict[str, Any] = {name: size}
    if name == "tensor":
        changes["sequence"] = size > 1
    if name == "pipeline":
        ends = end_stages(best.arch.num_layers, size)
        require(ends is not None, f"pipeline={size}", "does not divide the layers")
        changes |= {"first_stage_layers": ends or None, "last_stage_layers": ends or None}
        changes |= {"virtual_pipeline": cfg.parallel.virtual_pipeline if size > 1 else None}
    parallel = dataclasses.replace(cfg.parallel, **changes)
    parallel.mesh(best.trainer_gpus).stage_layers(best.arch.num_layers)
    return _with_config(best, dataclasses.replace(cfg, parallel=parallel))


def _recomputing(best: Setting, recompute: Recompute) -> Setting:
    cfg = best.config
    return _with_config(best, dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, recompute=recompute)))


def _with_config(setting: Setting, config: Config) -> Setting:
    return dataclasses.replace(setting, config=config)
