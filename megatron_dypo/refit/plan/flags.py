"""The mesh of the servers that a run starts, from SGLang's flags in the config."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.checks import require
from megatron_dypo.config.server_flags import ATTENTION_COPIES, REPLICAS, SPREAD_ATTENTION, value_of
from megatron_dypo.refit.plan.server_mesh import WITH_WHOLE_SHARED, ServerMesh, mesh_of_settings


def mesh_of_flags(tensor: int, extra_args: Sequence[str], *, expert: int | None = None) -> ServerMesh:
    """Return the mesh of the servers that a run starts.

    Args:
        tensor: ``rollout.servers.tensor_parallel``.
        extra_args: ``rollout.servers.extra_args``.
        expert: experts' size if the arguments do not count.

    Raises:
        ValueError: names the flag whose value is no size.
    """

    def size(name: str, *others: str) -> int | None:
        value = value_of(extra_args, name, *others)
        if value is None:
            return None
        require(
            isinstance(value, str) and value.isdigit() and int(value) > 0,
            f"rollout.servers.extra_args: {name} {value}",
            "must be positive",
        )
        return int(value)

    copies = size(*ATTENTION_COPIES)
    if copies is None and value_of(extra_args, SPREAD_ATTENTION):
        copies = size(*REPLICAS)
    dispatch = str(value_of(extra_args, "--moe-a2a-backend") or "none")
    ep_size = size("--ep-size", "--ep", "--expert-parallel-size")
    return mesh_of_settings(
        tensor,
        expert or ep_size or (tensor if dispatch in WITH_WHOLE_SHARED else 1),
        copies or 1,
        size("--moe-dense-tp-size"),
        dispatch,
        output_by_attention=bool(value_of(extra_args, "--enable-dp-lm-head")),
    )
