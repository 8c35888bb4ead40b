"""Checks before the first refit: trainer and servers must hold the same model.

SGLang ignores unknown names and crashes on wrong shapes, so nothing is sent before all checks pass.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_dypo.config.server_flags import PLANNED, problem_of
from megatron_dypo.models.architecture import Architecture, load_architecture
from megatron_dypo.models.bridged import load_bridged
from megatron_dypo.models.families.registry import family_rows, match
from megatron_dypo.models.hf.json_file import read_json_object
from megatron_dypo.models.quantized.names import NO_REFIT, is_mxfp4
from megatron_dypo.models.stacked_experts import stored_names
from megatron_dypo.refit.answers import ServerError, ServerInfo
from megatron_dypo.refit.control import SGLangControl
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.leader import Leader
from megatron_dypo.refit.lockstep import Lockstep
from megatron_dypo.refit.plan.server_mesh import check_serving
from megatron_dypo.refit.source import Source
from megatron_dypo.refit.transports.reported_mesh import mesh_of, planned_problem


def check_shapes(
    named_params: Iterable[tuple[str, Tensor]], arch: Architecture, tp_size: int, etp_size: int = 1
) -> None:
    """Raise ValueError unless each parameter of this rank has a rule, and the shape that its rule gives."""
    for name, param in named_params:
        row = match(name, arch)
        expected = row.rule.mcore_shape(arch, etp_size if row.is_expert else tp_size)
        if tuple(param.shape) != expected:
            raise ValueError(f"{name}: shape {tuple(param.shape)}, the architecture needs {expected}")


def check_names(names_by_stage: Iterable[Iterable[str]], arch: Architecture) -> None:
    """Raise ValueError unless exactly one stage sends each HF tensor of the architecture.

    The error names the tensors that are missing, sent twice, or not of this architecture.
    """
    counts = Counter(name for names in names_by_stage for name in names)
    expected = set(stored_names(dict.fromkeys(name for row in family_rows(arch) for name in row.hf), arch))
    problems = [f"{name} is held by no stage" for name in sorted(expected - counts.keys())]
    problems += [f"{name} is not of this architecture" for name in sorted(counts.keys() - expected)]
    problems += [f"{name} is sent {count} times" for name, count in sorted(counts.items()) if count > 1]
    if problems:
        raise ValueError("weights to refit: " + "; ".join(problems))


def check_server(info: ServerInfo, arch: Architecture) -> None:
    """Raise ServerError unless a server serves this architecture, according to its answers and its model folder.

    The folder is compared if this process can read it. The error names the fields that differ, or the computation that
    SGLang does differently, or a setting with which no refit can serve.
    """
    if problem := problem_of(info.settings, "auto"):
        raise ServerError(f"{info.url}: {problem}")
    if not arch.is_bridged:
        try:
            check_serving(arch, mesh_of(info))
        except ValueError as error:
            raise ServerError(f"{info.url}: {error}") from error
    if note := arch.check_serving(0):
        raise ServerError(f"{info.url}: {note}")
    if info.model_type != arch.family:
        raise ServerError(f"{info.url}: serves model_type={info.model_type!r}, the policy is {arch.family!r}")
    if not (Path(info.model_path) / "config.json").is_file():
        return
    if is_mxfp4(read_json_object(Path(info.model_path) / "config.json")):
        raise ServerError(f"{info.url}: serves {info.model_path} {NO_REFIT}")
    served = load_bridged(info.model_path) if arch.is_bridged else load_architecture(info.model_path)
    for name in Architecture.__dataclass_fields__:
        ours, theirs = getattr(arch, name), getattr(served, name)
        if ours != theirs:
            raise ServerError(f"{info.url}: serves {info.model_path} with {name}={theirs!r}, the policy has {ours!r}")


def check_model(
    source: Source, lockstep: Lockstep, leader: Leader, deadline: Deadline, transport: str = "auto"
) -> None:
    """Check shapes and names of all ranks' parameters, and all servers. Collective over the world.

    Args:
        transport: ``refit.transport``. If it is ``p2p`` or ``local``, servers that these cannot reach are refused here,
            before any server is paused.

    Raises:
        RefitError: on all ranks, with the errors of the checks above.
    """
    if source.arch.is_bridged:  # names and sizes were compared with the HF folder when the weights were opened
        leader.run(_check_servers, source.arch, transport, deadline)
        return
    held = lockstep.run(functools.partial(_check_held, source) if source.layout.is_sender else None)
    by_rank = [names for names in lockstep.gather(held) if names]
    leader.run(lambda _: check_names(by_rank, source.arch))
    leader.run(_check_servers, source.arch, transport, deadline)


def _check_servers(control: SGLangControl, arch: Architecture, transport: str, deadline: Deadline) -> None:
    for info in control.describe(deadline):
        check_server(info, arch)
        if transport in PLANNED and not arch.is_bridged and (problem := planned_problem([info], arch)):
            raise ServerError(problem)  # without a URL: the config is at fault, so the server is not fenced


def _check_held(source: Source) -> list[str]:
    """Check the shapes of this rank's parameters; return the names of the HF tensors that this rank sends."""
    layout = source.layout
    check_shapes(source.params(), source.arch, layout.tensor, layout.expert_tensor)
    return [spec.name for spec in source.specs()]
