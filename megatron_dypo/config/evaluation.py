"""The evaluation's part of the configuration tree; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.data import Format

_MAX_SET_NAME = 80
"""Largest name of an evaluation set, in bytes: escaped, it becomes the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out accuracy, sampled from the servers of the run."""

    prompts: tuple[str, ...] | dict[str, str] = ()
    """Evaluation sets: a list of JSONL or Parquet files, each set named after its file, or a mapping from name to
    file."""
    format: Format | None = None
    """Column names of these files, as in ``data.format``. ``null``: the same columns as the training files."""
    every: int = 0
    """Steps between evaluations. 0: only before the first and after the last step."""
    samples_per_prompt: int = 1
    """Responses sampled for each prompt."""
    temperature: float = 0.6
    """Sampling temperature (paper: 0.6). 0: greedy."""
    max_prompts: int | None = None
    """Evaluate only the first prompts of each set. ``null``: all."""

    def __post_init__(self) -> None:
        require_positive(self, "samples_per_prompt")
        require_not_negative(self, "every", "temperature")
        if self.max_prompts is not None:
            require_positive(self, "max_prompts")
        for name, paths in self._paths_by_name().items():
            require(
                bool(name.strip()) and name not in (".", "..") and len(name.encode(errors="replace")) <= _MAX_SET_NAME,
                f"prompts: a set named {name!r} ({paths[0]})",
                f"a name is a part of metrics and a folder: at most {_MAX_SET_NAME} bytes, not blank, neither . nor ..",
            )
            require(
                len(paths) == 1,
                f"prompts={list(self.prompts)}",
                f"{len(paths)} sets would be named {name!r}: give them names, as in prompts: {{first: {paths[0]}, "
                f"second: {paths[-1]}}}",
            )

    def _paths_by_name(self) -> dict[str, list[str]]:
        if isinstance(self.prompts, dict):
            return {name: [path] for name, path in self.prompts.items()}
        found: dict[str, list[str]] = {}
        for path in self.prompts:
            found.setdefault(PurePath(path).stem, []).append(path)
        return found

    @property
    def sets(self) -> dict[str, str]:
        """The file of each evaluation set, by name."""
        return {name: paths[0] for name, paths in self._paths_by_name().items()}
