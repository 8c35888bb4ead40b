"""The teacher draw: uniform, and a pure function of (seed, prompt id, visit)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from megatron_dypo.data.teachers import draw_trace
from tests.support.teacher_draws import TEACHERS, drawn_name, prompt_of


@pytest.mark.parametrize("vary", ["prompt", "visit", "seed"])
def test_the_draw_is_uniform_over_present_teachers(vary: str) -> None:
    draws = {
        "prompt": lambda i: drawn_name(prompt_of(f"train.jsonl:{i}"), 1),
        "visit": lambda i: drawn_name(prompt_of("train.jsonl:1", visit=i), 1),
        "seed": lambda i: drawn_name(prompt_of("train.jsonl:1"), i),
    }
    counts = Counter(draws[vary](i) for i in range(6000))
    assert chisquare([counts[name] for name in TEACHERS]).pvalue > 1e-3


def test_draws_of_successive_visits_are_independent() -> None:
    pairs = Counter((drawn_name(prompt_of(f"{i}", 0), 1), drawn_name(prompt_of(f"{i}", 1), 1)) for i in range(9000))
    assert chisquare([pairs[a, b] for a in TEACHERS for b in TEACHERS]).pvalue > 1e-3


@given(present=st.permutations(TEACHERS), count=st.integers(0, 3), prompt_id=st.text(), seed=st.integers())
def test_only_present_teachers_are_drawn_whatever_their_order(
    present: list[str], count: int, prompt_id: str, seed: int
) -> None:
    names = tuple(present[:count])
    drawn = draw_trace(prompt_of(prompt_id, teachers=names), seed)
    if not names:
        assert drawn is None
        return
    assert drawn is not None
    assert drawn[1][0] == names.index(drawn[0])
    assert drawn_name(prompt_of(prompt_id, teachers=tuple(sorted(names))), seed) == drawn[0]


def test_another_process_draws_the_same() -> None:
    code = (
        "from tests.support.teacher_draws import drawn_name, prompt_of;"
        "print(*[drawn_name(prompt_of(f'p{i}', visit=i % 3), 7) for i in range(50)])"
    )
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    output = run.stdout.split()
    assert output == [drawn_name(prompt_of(f"p{i}", visit=i % 3), 7) for i in range(50)]
    assert len(set(output)) == 3
