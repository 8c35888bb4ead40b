"""Write the proposals of ``plan --search`` as text for people and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_dypo.planning.intervals import interval
from megatron_dypo.planning.search import FREE, Proposal


def render_proposals(proposals: Sequence[Proposal]) -> str:
    """Return the proposals as text that ends with a newline: seconds, layout, why, and the overrides that make it."""
    first = proposals[0]
    nodes, gpu = first.trainer_nodes + first.server_nodes, first.setting.gpu.name
    lines = [
        f"SEARCH over {nodes} nodes × {first.setting.gpus_per_node} {gpu}; every proposal leaves {FREE:.0%} of the "
        "memory free; why: what its neighbours would cost"
    ]
    for number, proposal in enumerate(proposals, start=1):
        low, high = interval(proposal.time.total, "step")
        lines += [
            f"{number}. {proposal.time.total:.1f} s ({low:.1f} – {high:.1f}) a step: {_layout(proposal)}",
            f"   why: {_balance(proposal)}; {proposal.why}",
            f"   --nodes {proposal.trainer_nodes} {' '.join(overrides(proposal))}",
        ]
    return "\n".join(lines) + "\n"


def overrides(proposal: Proposal) -> list[str]:
    """Return the config's keys that make the proposal, as ``section.key=value``."""
    cfg = proposal.setting.config
    parallel, rollout = cfg.parallel, cfg.rollout
    values = {
        f"parallel.{name}": getattr(parallel, name)
        for name in (
            "num_processes",
            "tensor",
            "sequence",
            "pipeline",
            "virtual_pipeline",
            "first_stage_layers",
            "last_stage_layers",
            "context",
            "expert",
            "expert_tensor",
            "expert_dispatcher",
        )
    } | {
        "model.recompute": cfg.model.recompute,
        "batching.tokens_per_microbatch": cfg.batching.tokens_per_microbatch,
        "optimizer.distributed": cfg.optimizer.distributed,
        "rollout.max_in_flight": rollout.max_in_flight,
        "rollout.servers.urls": "[]",
        "rollout.servers.nodes": rollout.servers.nodes,
        "rollout.servers.per_node": rollout.servers.per_node,
        "rollout.servers.tensor_parallel": rollout.servers.tensor_parallel,
    }
    return [f"{name}={_yaml(value)}" for name, value in values.items()]


def proposals_as_data(proposals: Sequence[Proposal]) -> dict[str, Any]:
    """Return the proposals as plain data: nodes, seconds, overrides."""
    return {
        "proposals": [
            {
                "trainer_nodes": proposal.trainer_nodes,
                "server_nodes": proposal.server_nodes,
                "total_s": proposal.time.total,
                "rollout_s": proposal.time.rollout,
                "trainer_s": proposal.time.trainer,
                "why": proposal.why,
                "overrides": overrides(proposal),
            }
            for proposal in proposals
        ]
    }


def _layout(proposal: Proposal) -> str:
    setting = proposal.setting
    parallel = setting.config.parallel
    axes = f"TP {parallel.tensor} × PP {parallel.pipeline} × CP {parallel.context} × DP {setting.data}"
    extras = [
        f"EP {parallel.expert}" if parallel.expert > 1 else "",
        f"{parallel.virtual_pipeline} chunks a stage" if parallel.virtual_pipeline else "",
        "layers recomputed" if setting.config.model.recompute == "full" else "nothing recomputed",
    ]
    servers = f"{setting.num_servers} servers × TP {setting.config.rollout.servers.tensor_parallel}"
    trained = ", ".join([axes, *filter(None, extras)])
    return f"{proposal.trainer_nodes} nodes train ({trained}), {proposal.server_nodes} serve ({servers})"


def _balance(proposal: Proposal) -> str:
    time = proposal.time
    beside = "beside" if time.is_async else "then"
    return f"rollouts {time.rollout:.0f} s {beside} log-probs and update {time.trainer:.0f} s"


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
