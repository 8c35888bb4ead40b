"""The mesh of a running server by its answers, and why the planned transports cannot reach a server."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.config.server_flags import problem_of
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.refit.answers import ServerError, ServerInfo
from megatron_dypo.refit.plan.server_mesh import ServerMesh, check_server_mesh, mesh_of_settings
from megatron_dypo.rollout.server.command import WEIGHT_LOADER
from megatron_dypo.supported import WEIGHT_SESSIONS


def server_mesh(info: ServerInfo) -> ServerMesh:
    """Return the mesh of a server.

    Raises:
        ServerError: the planned transports cannot reach this server.
    """
    for name in ("pipeline_parallel", "data_parallel"):
        size = getattr(info, name)
        if size != 1:
            raise ServerError(f"{info.url}: {name}={size}: p2p and local need 1; use refit.transport=disk", info.url)
    if not info.has_sessions:
        raise ServerError(
            f"{info.url}: SGLang {info.sglang}: p2p and local need {WEIGHT_SESSIONS} or newer, which has weight-update "
            "sessions; use refit.transport=broadcast or disk",
            info.url,
        )
    if problem := problem_of(info.settings, "p2p"):
        raise ServerError(f"{info.url}: {problem}", info.url)
    if WEIGHT_LOADER not in info.custom_loaders:
        raise ServerError(
            f"{info.url}: custom_weight_loader={list(info.custom_loaders)}: start the server with "
            f"--custom-weight-loader {WEIGHT_LOADER}, or use refit.transport=broadcast",
            info.url,
        )
    return mesh_of(info)


def mesh_of(info: ServerInfo) -> ServerMesh:
    """Return the mesh that a server reports.

    Raises:
        ServerError: its sizes do not suit each other.
    """
    try:
        return mesh_of_settings(
            info.tensor_parallel,
            info.expert_parallel,
            info.attention_data,
            info.dense_tensor,
            info.dispatch,
            output_by_attention=info.output_by_attention,
        )
    except ValueError as error:
        raise ServerError(f"{info.url}: {error}") from error  # without a URL: its flags are at fault


def planned_problem(infos: Sequence[ServerInfo], arch: Architecture) -> str | None:
    """Return why the planned transports cannot bring ``arch`` to one of the servers; None: they can reach all."""
    for info in infos:
        try:
            check_server_mesh(arch, server_mesh(info))
        except ServerError as error:
            return str(error)
        except ValueError as error:
            return f"{info.url}: {error}; use refit.transport=broadcast or disk"
    return None
