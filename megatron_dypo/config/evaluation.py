"""The section ``eval`` of the configuration tree: evaluation sets, and how responses to them are sampled and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.data import Format
from megatron_dypo.config.grading import require_verifier

_MAX_SET_NAME = 80
"""Longest name of an evaluation set, in bytes. The name, escaped, becomes the name of a folder."""
MAX_SAMPLES = 1024
"""Most responses to one prompt. pass@k counts choices among them; up to this number the count fits into a float."""


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One evaluation set. A key that is ``null`` takes the value of the section ``eval``."""

    path: str
    """JSONL or Parquet file with prompts and answers."""
    format: Format | None = None
    """Column names of the file, as in ``data.format``."""
    verifier: str | None = None
    """Verifier of the set's rows, named as in ``grading.verifier``. A row that names its own verifier keeps it.
    ``null``: the verifier of the row's source (``grading.by_source``), else ``grading.verifier``."""
    samples_per_prompt: int | None = None
    """Responses sampled for each prompt."""
    temperature: float | None = None
    """Sampling temperature. 0: greedy."""
    max_prompts: int | None = None
    """Evaluate only the first prompts of the set."""
    shuffle_options: bool = False
    """Multiple choice: shuffle the options of each prompt anew for each response, and change the answer's letter
    accordingly. Seed, prompt and response number determine the order. docs/evaluation.md says how options are found."""

    def __post_init__(self) -> None:
        require(bool(self.path.strip()), f"path={self.path!r}", "is required: a JSONL or Parquet file")
        require_sampling(self)
        if self.verifier is not None:
            require_verifier("verifier", self.verifier)


def require_sampling(section: EvalSetConfig | EvalConfig) -> None:
    """Require the numbers that a set may override to be in their ranges."""
    samples = section.samples_per_prompt
    if samples is not None:
        require(1 <= samples <= MAX_SAMPLES, f"samples_per_prompt={samples}", f"must be from 1 to {MAX_SAMPLES}")
    if section.temperature is not None:
        require_not_negative(section, "temperature")
    if section.max_prompts is not None:
        require_positive(section, "max_prompts")


@dataclass(frozen=True, kw_only=True)
class SetSettings:
    """The resolved settings of one evaluation set: its own values, else those of the section."""

    path: str
    format: Format | None
    """None: the same columns as the training files."""
    verifier: str | None
    samples_per_prompt: int
    temperature: float
    max_prompts: int | None
    shuffle_options: bool


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out sets. A run evaluates the model under training on its own servers; ``megatron-dypo eval``
    evaluates any model."""

    sets: Mapping[str, EvalSetConfig] = field(default_factory=dict)
    """Evaluation sets: a mapping from name to ``{path: FILE}`` and the set's other keys."""
    format: Format | None = None
    """Column names of the sets' files, as in ``data.format``. ``null``: the same columns as the training files."""
    every: int = 0
    """Steps between evaluations of a run. 0: only before the first and after the last step."""
    samples_per_prompt: int = 1
    """Responses sampled for each prompt."""
    temperature: float = 0.6
    """Sampling temperature (paper: 0.6). 0: greedy."""
    max_prompts: int | None = None
    """Evaluate only the first prompts of each set. ``null``: all."""

    def __post_init__(self) -> None:
        require_sampling(self)
        require_not_negative(self, "every")
        for name, one in self.sets.items():
            require(
                bool(name.strip()) and name not in (".", "..") and len(name.encode(errors="replace")) <= _MAX_SET_NAME,
                f"sets: a set named {name!r} ({one.path})",
                f"metrics and a folder have this name: at most {_MAX_SET_NAME} bytes, not blank, neither . nor ..",
            )

    def settings(self, name: str) -> SetSettings:
        """Return the settings of the set ``name``."""
        own = self.sets[name]
        values = {option.name: getattr(own, option.name) for option in fields(SetSettings)}
        return SetSettings(
            **{
                key: getattr(self, key) if value is None and hasattr(self, key) else value
                for key, value in values.items()
            }
        )

    def verifiers(self) -> dict[str, str]:
        """Return key → verifier for each set that names one."""
        return {
            f"eval.sets.{name}.verifier": one.verifier for name, one in self.sets.items() if one.verifier is not None
        }
