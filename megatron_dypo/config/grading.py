"""The verifier's part of the configuration tree; see :mod:`megatron_dypo.config.tree`."""

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
    """How answers are verified."""

    verifier: str = "math"
    """``math``, ``exact``, ``choice``, or an import path ``pkg.module:function``; ``docs/own_verifier.md`` says what
    such a function gets and may return."""
    workers: int = 2
    """Verifier processes on each data-parallel rank."""
    deadline_s: float = 10.0
    """A verification that takes longer is stopped and gives no verdict."""
    fail_truncated: bool = True
    """A rollout that hit the length limit is incorrect whatever it says."""
    by_source: Mapping[str, str] = field(default_factory=dict)
    """Source → the verifier of its rows, named as in ``verifier``. Other sources have ``verifier``."""
    row_verifiers: tuple[str, ...] = ()
    """Import paths that rows may name as their own verifier, besides the built-in ones and those named above: a data
    file alone must not decide which code runs."""
    batch_size: int = 32
    """Most responses that a batched or asynchronous verifier gets at a time."""
    answer_format: AnswerFormat = "auto"
    """Where the built-in verifiers look for the answer: ``boxed`` (``\\boxed{…}``), ``answer_tag`` (``<answer>…</answer>``),
    ``r1_zero`` (``<think>…</think> <answer>…</answer>`` and nothing else), ``final_answer`` ("Final answer: …"), ``gsm8k``
    (``#### …``); ``auto`` tries them all. See ``docs/verifiers.md``."""
    thinking: Thinking = "after"
    """Which part of a response that thinks in ``<think>…</think>`` the built-in verifiers read. ``after``: what follows the
    last ``</think>``; thinking that never ends states no answer. ``required``: the same, and a response without
    ``</think>`` states no answer (for prompts that open ``<think>``). ``anywhere``: the whole response."""

    def __post_init__(self) -> None:
        require_positive(self, "workers", "deadline_s", "batch_size")
        require(self.deadline_s <= _DAY_S, f"deadline_s={self.deadline_s}", f"must be at most {_DAY_S} (a day)")
        for key, name in self.named_verifiers():
            require(
                name in BUILT_IN_VERIFIERS or _IMPORT_PATH.fullmatch(name) is not None,
                f"{key}={name!r}",
                f"must be one of {', '.join(BUILT_IN_VERIFIERS)} or an import path pkg.module:function",
            )

    def named_verifiers(self) -> list[tuple[str, str]]:
        """Return (key, verifier) for each key of this section that names one: ``by_source.gsm8k``, ``exact``."""
        return [
            ("verifier", self.verifier),
            *((f"by_source.{source}", name) for source, name in self.by_source.items()),
            *((f"row_verifiers[{index}]", name) for index, name in enumerate(self.row_verifiers)),
        ]
