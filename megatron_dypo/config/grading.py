"""The verifier's part of the configuration tree; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dypo.config.rules import require, require_positive

AnswerFormat = Literal["auto", "boxed", "answer_tag", "r1_zero", "final_answer", "gsm8k"]
Thinking = Literal["after", "required", "anywhere"]


@dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """How answers are verified."""

    verifier: str = "math"
    """``math``, ``exact``, ``choice``, or an import path ``pkg.module:function`` of ``(response, answer) -> bool | float | dict``."""
    workers: int = 2
    """Verifier processes on each data-parallel rank."""
    deadline_s: float = 10.0
    """A verification that takes longer is stopped and counted as an error."""
    truncated_is_wrong: bool = True
    """A rollout that hit the length limit is incorrect whatever it says."""
    answer_format: AnswerFormat = "auto"
    """Where the built-in verifiers look for the answer: ``boxed`` (``\\boxed{…}``), ``answer_tag`` (``<answer>…</answer>``),
    ``r1_zero`` (``<think>…</think> <answer>…</answer>`` and nothing else), ``final_answer`` ("Final answer: …"), ``gsm8k``
    (``#### …``); ``auto`` tries them all. See ``docs/verifiers.md``."""
    thinking: Thinking = "after"
    """Which part of a response that thinks in ``<think>…</think>`` the built-in verifiers read. ``after``: what follows the
    last ``</think>``; thinking that never ends states no answer. ``required``: the same, and a response without
    ``</think>`` states no answer (for prompts that open ``<think>``). ``anywhere``: the whole response."""

    def __post_init__(self) -> None:
        require_positive(self, "workers", "deadline_s")
        known = ("math", "exact", "choice")
        require(
            self.verifier in known or ":" in self.verifier,
            f"verifier={self.verifier!r}",
            f"must be one of {', '.join(known)} or an import path pkg.module:function",
        )
