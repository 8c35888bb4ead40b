"""The section ``grading`` of the configuration tree: how responses are judged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.checks import require, require_positive

AnswerFormat = Literal["auto", "boxed", "answer_tag", "r1_zero", "final_answer", "gsm8k"]
Thinking = Literal["after", "required", "anywhere"]
BUILT_IN_VERIFIERS = ("math", "exact", "choice")
_DAY_S = 86400
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """How responses are judged right or wrong."""

    verifier: str = "math"
    """``math``, ``exact``, ``choice``, or the import path ``pkg.module:function`` of a function of yours. See
    docs/own_verifier.md for its arguments and return values."""
    workers: int = 2
    """Verifier processes on each data-parallel rank."""
    deadline_s: float = 10.0
    """Stop a verification after this many seconds. The response then has no verdict."""
    fail_truncated: bool = True
    """Count every rollout that hit the length limit as wrong, whatever it says."""
    by_source: Mapping[str, str] = field(default_factory=dict)
    """Verifier for the rows of each source, named as in ``verifier``. Rows of other sources use ``verifier``."""
    row_verifiers: tuple[str, ...] = ()
    """Import paths that a row may name as its own verifier, besides the built-in verifiers and those named above. The
    list is needed because a data file alone must not decide which code runs."""
    batch_size: int = 32
    """Most responses that a batched or asynchronous verifier gets in one call."""
    answer_format: AnswerFormat = "auto"
    """Where the built-in verifiers look for the answer: ``boxed`` (``\\boxed{…}``), ``answer_tag``
    (``<answer>…</answer>``), ``r1_zero`` (``<think>…</think> <answer>…</answer>`` and nothing else),
    ``final_answer`` ("Final answer: …"), ``gsm8k`` (``#### …``); ``auto`` tries them all. See ``docs/verifiers.md``."""
    thinking: Thinking = "after"
    """Part of a response with ``<think>…</think>`` that the built-in verifiers read. ``after``: the text after the last
    ``</think>``; a response whose thinking never ends has no answer. ``required``: the same, and a response without
    ``</think>`` has no answer (for prompts that open ``<think>``). ``anywhere``: the whole response."""

    def __post_init__(self) -> None:
        require_positive(self, "workers", "deadline_s", "batch_size")
        require(self.deadline_s <= _DAY_S, f"deadline_s={self.deadline_s}", f"must be at most {_DAY_S} (a day)")
        for key, name in self.named_verifiers():
            require_verifier(key, name)

    def named_verifiers(self) -> list[tuple[str, str]]:
        """Return (key, verifier) for each key of this section that names a verifier, such as (``by_source.gsm8k``,
        ``exact``)."""
        return [
            ("verifier", self.verifier),
            *((f"by_source.{source}", name) for source, name in self.by_source.items()),
            *((f"row_verifiers[{index}]", name) for index, name in enumerate(self.row_verifiers)),
        ]


def require_verifier(key: str, name: str) -> None:
    """Require ``name``, the value of ``key``, to name a built-in verifier or to be an import path."""
    require(
        name in BUILT_IN_VERIFIERS or _IMPORT_PATH.fullmatch(name) is not None,
        f"{key}={name!r}",
        f"must be one of {', '.join(BUILT_IN_VERIFIERS)} or an import path pkg.module:function",
    )
