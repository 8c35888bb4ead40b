"""The data's part of the configuration tree: prompt files, their columns, templates and limits; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class DataFieldsConfig:
    """Names of the columns of a prompt file."""

    prompt: str = "prompt"
    """A string, or a list of chat messages ``{"role", "content"}``."""
    answer: str = "answer"
    source: str = "source"
    """Optional column."""
    traces: str = "traces"
    """Optional column: an object, teacher name → trace text."""
    id: str = "id"
    """Optional column."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, answers and teacher traces."""

    prompts: tuple[str, ...] = ()
    """JSONL or Parquet files."""
    fields: DataFieldsConfig = field(default_factory=DataFieldsConfig)
    teachers: tuple[str, ...] | None = None
    """Teachers to use, by name; None: every teacher that a row has."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template; False: as they are. Needs a template when messages are given."""
    max_prompt_tokens: int = 1024
    """Longer prompts are counted and dropped."""
    max_trace_tokens: int = 8192
    """Longer traces are counted and dropped."""
    shuffle: bool = True
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    """More values for the chat template (``{enable_thinking: false}``). One that the template never reads is an error."""

    def __post_init__(self) -> None:
        require_positive(self, "max_prompt_tokens", "max_trace_tokens")
        require(
            self.chat_template or not self.chat_template_args,
            f"chat_template_args={dict(self.chat_template_args)}",
            "needs chat_template=true",
        )
