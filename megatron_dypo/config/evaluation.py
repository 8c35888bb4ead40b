"""The section ``eval`` of the configuration tree: evaluation sets, and how responses to them are sampled and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.data import Format
from megatron_dypo.config.grading import require_verifier

_MAX_SET_NAME = 80
"""Largest name of an evaluation set, in bytes: escaped, it becomes the name of a folder."""
MAX_SAMPLES = 1024
"""Most responses to one prompt: pass@k counts choices among them, which stay below the largest float up to there."""


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One evaluation set. ``null``: as the section ``eval`` says."""

    path: str
    """JSONL or Parquet file with prompts and answers."""
    format: Format | None = None
    """Column names of the file, as in ``data.format``."""
    verifier: str | None = None
    """Verifier of the set's rows, named as in ``grading.verifier``; a row that names its own keeps that. ``null``: each
    row's verifier follows from its source (``grading.by_source``), else it is ``grading.verifier``."""
    samples_per_prompt: int | None = None
    """Responses sampled for each prompt."""
    temperature: float | None = None
    """Sampling temperature. 0: greedy."""
    max_prompts: int | None = None
    """Evaluate only the first prompts of the set."""
    shuffle_options: bool = False
    """Multiple choice: put the options of each prompt into a new order for each response, and the answer's letter with
    them. The order follows from seed, prompt and response. docs/evaluation.md says how options are found."""

    def __post_init__(self) -> None:
        require(bool(self.path.strip()), f"path={self.path!r}", "is required: a JSONL or Parquet file")
        require_sampling(self)
        if self.verifier is not None:
            require_verifier("verifier", self.verifier)


def require_sampling(section: EvalSetConfig | EvalConfig) -> None:
    """Require the numbers that both the section and a set of it may give to be in their ranges."""
    samples = section.samples_per_prompt
    if samples is not None:
        require(1 <= samples <= MAX_SAMPLES, f"samples_per_prompt={samples}", f"must be from 1 to {MAX_SAMPLES}")
    if section.temperature is not None:
        require_not_negative(section, "temperature")
    if section.max_prompts is not None:
        require_positive(section, "max_prompts")


@dataclass(frozen=True, kw_only=True)
class SetSettings:
    """One evaluation set with nothing left open: its own values, else those of the section."""

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
    """Held-out accuracy: of the model under training from the servers of the run, or of any model by
    ``megatron-dypo eval``."""

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
                f"a name is a part of metrics and a folder: at most {_MAX_SET_NAME} bytes, not blank, neither . nor ..",
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
