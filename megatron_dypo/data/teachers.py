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
    # JSON separates the parts, so that ("a", 11) and ("a1", 1) differ.
    key = json.dumps([seed, prompt.prompt_id, prompt.visit]).encode()
    draw = int.from_bytes(hashlib.sha256(key).digest(), "big")
    # With 256 bits the remainder deviates from uniform by less than m / 2^256.
    name = names[draw % len(names)]
    return name, prompt.traces[name]
