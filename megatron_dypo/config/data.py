"""The data's part of the configuration tree (:mod:`megatron_dypo.config.tree`): prompt files, columns, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dypo.checks import require, require_positive

Format = Literal["plain", "verl", "slime", "openr1", "deepmath"]


@dataclass(frozen=True, kw_only=True)
class DataFieldsConfig:
    """Names of the columns of a prompt file.

    None: the name that ``data.format`` has for it (:mod:`megatron_dypo.data.formats`); '': there is no such column.
    ``reward_model.ground_truth`` is the field ``ground_truth`` of the object ``reward_model``, unless a column is
    itself called so.
    """

    prompt: str | None = None
    """A string, or a list of chat messages ``{"role", "content"}``."""
    answer: str | None = None
    """A string or a number; an object or a list where the verifier takes one."""
    source: str | None = None
    """Optional column."""
    traces: str | tuple[str, ...] | None = None
    """Optional columns: an object, teacher name → trace; a list of traces; or one trace. A trace is a text or an
    assistant's chat message."""
    id: str | None = None
    """Optional column."""
    verifier: str | None = None
    """Optional column: the row's own verifier, named as ``grading.verifier`` is."""
    trace_checks: str | tuple[str, ...] | None = None
    """Optional columns of booleans, one for each trace: a trace is used only where each of them says true."""

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            require(getattr(self, name) != "", f"{name}=''", "names no column, and every row needs one")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, answers and teacher traces."""

    prompts: tuple[str, ...] = ()
    """JSONL or Parquet files."""
    format: Format = "plain"
    """Whose columns the files have; what ``fields`` names wins."""
    fields: DataFieldsConfig = field(default_factory=DataFieldsConfig)
    keep_row: bool = False
    """Give the verifier the row's other columns too (``Prompt.row``)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """``skip``: leave out rows that break a rule; they are counted, and listed in the run folder's ``bad_rows.jsonl``."""
    teachers: tuple[str, ...] | None = None
    """Teachers to use, by name; None: every teacher that a row has."""
    drop_wrong_traces: bool = False
    """Let the verifier judge each trace once, at the start, and leave out those that it calls wrong."""
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
