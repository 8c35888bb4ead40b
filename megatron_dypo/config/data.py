"""The section ``data`` of the configuration tree: prompt files, their columns, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dypo.checks import require, require_positive

Format = Literal["plain", "verl", "slime", "openr1", "deepmath"]


@dataclass(frozen=True, kw_only=True)
class DataFieldsConfig:
    """Column names of the prompt files.

    ``null``: the name that ``data.format`` gives. ``''``: the files have no such column. A dot descends into an object:
    ``reward_model.ground_truth`` is the field ``ground_truth`` of the column ``reward_model``, unless a column has that
    whole name.
    """

    prompt: str | None = None
    """Column of the prompt: a string, or a list of chat messages ``{"role", "content"}``."""
    answer: str | None = None
    """Column of the answer: a string or a number, or an object or list if the verifier takes one."""
    source: str | None = None
    """Optional column with the name of the row's data set; see ``grading.by_source``."""
    traces: str | tuple[str, ...] | None = None
    """Optional columns of teachers' traces: an object from teacher name to trace, a list of traces, or one trace. A
    trace is a text or an assistant's chat message."""
    id: str | None = None
    """Optional column with a unique id of the row."""
    verifier: str | None = None
    """Optional column with the row's own verifier, named as in ``grading.verifier``."""
    trace_checks: str | tuple[str, ...] | None = None
    """Optional columns of booleans, one for each trace. A trace is used only if all of them say true."""

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            require(getattr(self, name) != "", f"{name}=''", "names no column, and every row needs one")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, answers and teachers' traces."""

    prompts: tuple[str, ...] = ()
    """JSONL or Parquet files to train on."""
    format: Format = "plain"
    """Whose column names the files use (docs/data.md has the table). A name in ``fields`` wins."""
    fields: DataFieldsConfig = field(default_factory=DataFieldsConfig)
    keep_row: bool = False
    """Give the verifier the row's other columns as well (``Prompt.row``)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """``error``: rows that break a rule end the run at start. ``skip``: leave them out, count them, and list them in
    the run folder's ``bad_rows.jsonl``."""
    teachers: tuple[str, ...] | None = None
    """Names of the teachers to use. ``null``: every teacher that a row has."""
    drop_wrong_traces: bool = False
    """Have the verifier judge each trace once, at the start, and leave out the wrong ones."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template. ``false``: use them as they are. Prompts that are chat
    messages need a template."""
    max_prompt_tokens: int = 1024
    """Longest prompt. Longer ones are dropped and counted."""
    max_trace_tokens: int = 8192
    """Longest trace. Longer ones are dropped and counted."""
    shuffle: bool = True
    """Draw the rows in a new random order in each epoch. ``false``: in the order of the files."""
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    """More values for the chat template, such as ``{enable_thinking: false}``. A name that the template never reads
    is an error."""

    def __post_init__(self) -> None:
        require_positive(self, "max_prompt_tokens", "max_trace_tokens")
        require(
            self.chat_template or not self.chat_template_args,
            f"chat_template_args={dict(self.chat_template_args)}",
            "needs chat_template=true",
        )
