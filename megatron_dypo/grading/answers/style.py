"""The style in which a response states its answer: its format, and the rule for thinking before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from megatron_dypo.checks import require
from megatron_dypo.config.grading import AnswerFormat, Thinking


@dataclass(frozen=True, kw_only=True)
class AnswerStyle:
    """The format and the thinking rule by which built-in verifiers look for an answer (``docs/verifiers.md``).

    Raises ValueError for an unknown format or thinking rule.
    """

    answer_format: AnswerFormat = "auto"
    """See ``grading.answer_format``."""
    thinking: Thinking = "after"
    """See ``grading.thinking``."""

    def __post_init__(self) -> None:
        for name, known in (("answer_format", get_args(AnswerFormat)), ("thinking", get_args(Thinking))):
            value = getattr(self, name)
            require(value in known, f"{name}={value!r}", f"must be one of {', '.join(known)}")


AUTO = AnswerStyle()
"""The style of a prompt that asks for no special format."""
