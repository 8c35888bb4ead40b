"""Draw teachers for prompts that consist of their traces only."""

from __future__ import annotations

import numpy as np

from megatron_dypo.data.teachers import draw_trace
from megatron_dypo.types import Prompt

TEACHERS = ("qwen", "r1", "terse")


def prompt_of(prompt_id: str, visit: int = 0, teachers: tuple[str, ...] = TEACHERS) -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        visit=visit,
        order=0,
        tokens=np.zeros(1, np.int32),
        text="",
        answer="",
        source="",
        traces={name: np.full(3, index, np.int32) for index, name in enumerate(teachers)},
    )


def drawn_name(prompt: Prompt, seed: int) -> str:
    drawn = draw_trace(prompt, seed)
    assert drawn is not None
    return drawn[0]
