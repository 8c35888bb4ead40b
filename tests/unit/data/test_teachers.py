"""The teacher draw: uniform, and a pure function of (seed, prompt id, visit)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from megatron_dypo.data.teachers import draw_trace
from megatron_dypo.types import Prompt

TEACHERS = ("qwen", "r1", "terse")


def _prompt(prompt_id: str, visit: int = 0, teachers: tuple[str, ...] = TEACHERS) -> Prompt:
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


def _name(prompt: Prompt, seed: int) -> str:
    drawn = draw_trace(prompt, seed)
    assert drawn is not None
    return drawn[0]


@pytest.mark.parametrize("vary", ["prompt", "visit", "seed"])
def test_the_draw_is_uniform_over_present_teachers(vary: str) -> None:
    draws = {
        "prompt": lambda i: _name(_prompt(f"train.jsonl:{i}"), 1),
        "visit": lambda i: _name(_prompt("train.jsonl:1", visit=i), 1),
        "seed": lambda i: _name(_prompt("train.jsonl:1"), i),
    }
    counts = Counter(draws[vary](i) for i in range(6000))
    assert chisquare([counts[name] for name in TEACHERS]).pvalue > 1e-3


def test_draws_of_successive_visits_are_independent() -> None:
    pairs = Counter((_name(_prompt(f"{i}", 0), 1), _name(_prompt(f"{i}", 1), 1)) for i in range(9000))
    assert chisquare([pairs[a, b] for a in TEACHERS for b in TEACHERS]).pvalue > 1e-3


@given(present=st.permutations(TEACHERS), count=st.integers(0, 3), prompt_id=st.text(), seed=st.integers())
def test_only_present_teachers_are_drawn_whatever_their_order(
    present: list[str], count: int, prompt_id: str, seed: int
) -> None:
    names = tuple(present[:count])
    drawn = draw_trace(_prompt(prompt_id, teachers=names), seed)
    if not names:
        assert drawn is None
        return
    assert drawn is not None
    assert drawn[1][0] == names.index(drawn[0])
    assert _name(_prompt(prompt_id, teachers=tuple(sorted(names))), seed) == drawn[0]


def test_another_process_draws_the_same() -> None:
    code = (
        "from tests.unit.data.test_teachers import _name, _prompt;"
        "print(*[_name(_prompt(f'p{i}', visit=i % 3), 7) for i in range(50)])"
    )
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    output = run.stdout.split()
    assert output == [_name(_prompt(f"p{i}", visit=i % 3), 7) for i in range(50)]
    assert len(set(output)) == 3
