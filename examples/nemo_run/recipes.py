"""Recipes: configs of this repository. NeMo-Run's command line selects one by ``model=NAME`` and changes it by
``model.section.key=value``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import nemo_run as run
import yaml
from nemo_run.cli.cli_parser import type_parser
from pydantic import TypeAdapter

from megatron_dypo.config.reading.load import load_config, override_lines
from megatron_dypo.config.tree import Config

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """A config, the file that it was read from, and the numbers of nodes."""

    file: str
    """YAML file, from the repository root."""
    trainer_nodes: int = 1
    rollout_nodes: int = 1
    """Nodes with ``rollout.servers.per_node`` servers each."""

    def overrides(self) -> list[str]:
        """Return ``section.key=value`` for each option that differs from :attr:`file`."""
        config = Config(**{f.name: getattr(self, f.name) for f in fields(Config)})
        return override_lines(load_config(ROOT / self.file), config)


@run.cli.factory
def tiny() -> run.Config[Recipe]:
    """Make the quickstart's DYPO run: a million parameters on two pipeline stages, one server, all on CPUs."""
    return _recipe("examples/quickstart/dypo.yaml")


@run.cli.factory
def qwen2_5_math_7b() -> run.Config[Recipe]:
    """Make the paper's setting: a node of eight GPUs that trains, and a node of eight servers."""
    return _recipe("examples/qwen2_5_math_7b/dypo.yaml")


@run.cli.factory
def llama3_70b() -> run.Config[Recipe]:
    """Make a run of Llama-3-70B on eight nodes that train and four nodes with a server each."""
    return _recipe("examples/llama3_70b/config.yaml", trainer_nodes=8, rollout_nodes=4)


def _recipe(file: str, overrides: Sequence[str] = (), **nodes: int) -> run.Config[Recipe]:
    config = load_config(ROOT / file, overrides)
    sections = {name: _as_run_config(section) for name, section in vars(config).items()}
    return run.Config(Recipe, file=file, **sections, **nodes)


def _as_run_config(value: Any) -> Any:
    """Return a tree of dataclasses as a tree of ``run.Config``, which the command line can change."""
    if not is_dataclass(value):
        return value
    return run.Config(type(value), **{f.name: _as_run_config(getattr(value, f.name)) for f in fields(value)})


def _options(section: type) -> Iterator[tuple[str, Any]]:
    """Yield for each option its annotation as text, and the type that the annotation means."""
    hints = get_type_hints(section)
    for f in fields(section):
        if is_dataclass(hints[f.name]):
            yield from _options(hints[f.name])
        else:
            yield str(f.type), hints[f.name]


def _register(annotation: str, kind: Any) -> None:
    """Make NeMo-Run read values of this type as ``train`` reads overrides: by YAML, then by pydantic.

    NeMo-Run's parser has no rule for annotations that are strings (``from __future__ import annotations``), for tuples,
    and for ``int | None``.
    """
    adapter = TypeAdapter(kind)
    type_parser.register_parser(annotation)(lambda text, _: adapter.validate_python(yaml.safe_load(text)))


for _annotation, _kind in dict(_options(Config)).items():
    _register(_annotation, _kind)
