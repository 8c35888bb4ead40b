"""The draw of the teacher for a prompt (paper, eq. 5 and 20)."""

from __future__ import annotations

import hashlib
import json

from megatron_dypo.types import Prompt, Tokens


def draw_trace(prompt: Prompt, seed: int) -> tuple[str, Tokens] | None:
    """Draw one teacher uniformly from those with a trace for ``prompt``; return its name and its [R] target tokens.

    The draw is a pure function of (seed, ``prompt_id``, ``visit``) and the names present. So it is the same in every
    process, on every rank and after a resume. Return None if no teacher is present.
    """
    names = sorted(prompt.traces)
    if not names:
        return None
    draw = _draw(seed, prompt)
    # 256 bits: the remainder's deviation from uniform is below m / 2^256.
    name = names[draw % len(names)]
    return name, prompt.traces[name]


def draw_share(prompt: Prompt, seed: int, low: float, high: float) -> float:
    """Draw a number uniformly between ``low`` and ``high``: of a trace, how much of it is used.

    A pure function of (seed, ``prompt_id``, ``visit``) as :func:`draw_trace`, and independent of that.
    """
    return low + (high - low) * (_draw(seed, prompt, "share") >> 203) / 2**53


def _draw(seed: int, prompt: Prompt, *purpose: str) -> int:
    """Return 256 bits that depend on the arguments alone."""
    # JSON keeps the parts apart: ("a", 11) and ("a1", 1) differ.
    key = json.dumps([seed, prompt.prompt_id, prompt.visit, *purpose]).encode()
    return int.from_bytes(hashlib.sha256(key).digest(), "big")
