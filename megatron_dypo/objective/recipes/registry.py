"""Objectives by name. A new one is a file in this folder and a row here, or a user's class named by its import path."""

from __future__ import annotations

from collections import Counter

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.metrics.names import METRICS
from megatron_dypo.objective.loss import sum_names
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.recipes.chord import Chord
from megatron_dypo.objective.recipes.dypo import Dypo
from megatron_dypo.objective.recipes.fixed import Fixed
from megatron_dypo.objective.recipes.grpo import Grpo
from megatron_dypo.objective.recipes.hpt import Hpt
from megatron_dypo.objective.recipes.luffy import Luffy
from megatron_dypo.objective.recipes.opd import Opd
from megatron_dypo.objective.recipes.prefix_rft import PrefixRft
from megatron_dypo.objective.recipes.relift import Relift
from megatron_dypo.objective.recipes.sft import Sft
from megatron_dypo.objective.recipes.sft_then_rl import SftThenRl
from megatron_dypo.objective.recipes.srft import Srft
from megatron_dypo.objective.recipes.superrl import SuperRl
from megatron_dypo.objective.recipes.trapo import Trapo
from megatron_dypo.processes.importing import import_name

OBJECTIVES: dict[str, type[Objective]] = {
    "dypo": Dypo,
    "grpo": Grpo,
    "sft": Sft,
    "sft_then_rl": SftThenRl,
    "fixed": Fixed,
    "superrl": SuperRl,
    "luffy": Luffy,
    "srft": Srft,
    "chord": Chord,
    "hpt": Hpt,
    "opd": Opd,
    "relift": Relift,
    "prefix_rft": PrefixRft,
    "trapo": Trapo,
}


def build_objective(cfg: ObjectiveConfig) -> Objective:
    """Return the objective that ``cfg.name`` names: a row of the registry, or ``package.module:Class``.

    Importing a class runs the code of its module. The path comes from the config alone, never from data.

    Raises:
        ValueError: there is no such objective, module or class, the class is not an :class:`Objective`, or the
            objective cannot work with the options.
    """
    if ":" in cfg.name:
        return _check_declarations(_import_class(cfg.name)(cfg), f"objective.name={cfg.name!r}")
    if cfg.name not in OBJECTIVES:
        raise ValueError(
            f"objective.name={cfg.name!r}: must be one of {', '.join(OBJECTIVES)}, or the import path of a class of "
            "yours, my_package.module:MyObjective"
        )
    built_in = OBJECTIVES[cfg.name]
    if cfg.options and built_in.options_type is None:
        raise ValueError(f"objective.options={dict(cfg.options)}: {cfg.name} has none")
    return built_in(cfg)


def _import_class(path: str) -> type[Objective]:
    """Import ``package.module:Class`` and require it to be a complete objective."""
    field, (module_name, _, class_name) = f"objective.name={path!r}", path.partition(":")
    if not module_name or not class_name.isidentifier():
        raise ValueError(f"{field}: must have the form my_package.module:MyObjective")
    try:
        found = import_name(path)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"{field}: {class_name} must be a subclass of {Objective.__module__}.Objective")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"{field}: {class_name} does not define {', '.join(missing)}")
    return found


def _check_declarations(objective: Objective, field: str) -> Objective:
    """Require the names of streams and metrics to be unique, and no metric to have the name of one of the trainer's."""
    streams = [stream.name for stream in objective.streams]
    metrics = [metric.name for metric in objective.metrics]
    twice = [name for names in (streams, metrics) for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{field}: declares {', '.join(twice)} twice")
    if taken := sorted({metric.name for metric in METRICS} & set(metrics)):
        raise ValueError(f"{field}: metrics {', '.join(taken)} are the trainer's own")
    sum_names(
        objective.loss, objective.streams
    )  # computes the loss once: an error in it is found before the run starts
    return objective
