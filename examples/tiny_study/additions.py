"""Task A: the quickstart's additions, with a third teacher, a second phrasing and numbers of another length."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
from task import ANSWER_MARK, TEACHERS, Addition, draw_problems, prompt_row

Rows = list[dict[str, object]]

PHRASING = "add {} to {}="
"""The other phrasing. The usual one is the quickstart's: ``478+964=``."""
VALIDATION = {0: 20, 1: 40, 2: 70, 3: 70}
HELDOUT = {0: 20, 1: 40, 2: 70, 3: 70}
PHRASED = {0: 10, 1: 20, 2: 35, 3: 35}
TRAIN = {0: 400, 1: 800, 2: 1400, 3: 1400}
WARMUP = {0: 6000, 1: 6000}
WARMUP_PHRASED = {0: 1500, 1: 1500}
"""Number of carries → number of problems of three digits."""
WARMUP_SHORT = {0: 600, 1: 600}
"""Number of carries → number of problems of two digits: the policy then knows that lengths differ."""
WARMUP_LONGER = {0: 6000}
LONGER = {0: 50, 1: 50}
"""Number of carries → number of problems of four digits. The policy sees four digits in the warm start alone, where no
column has a carry."""


def add_forgetfully(problem: Addition) -> str:
    """Write the trace of the teacher ``forgetful``: it leaves the carry out of every step, and ends with the right sum.

    Example: ``8+4=12,7+6=13,4+9=13####1442``.
    """
    steps = [f"{upper}+{lower}={upper + lower}" for upper, lower in problem.columns()]
    return f"{','.join(steps)}{ANSWER_MARK}{problem.answer}"


def rows_of(problems: Iterable[Addition], *, is_phrased: bool = False) -> Rows:
    """Return rows of prompt data with the traces of three teachers."""
    rows: Rows = []
    for problem in problems:
        traces = {name: teacher(problem) for name, teacher in TEACHERS.items()}
        row = {**prompt_row(problem), "traces": {**traces, "forgetful": add_forgetfully(problem)}}
        if is_phrased:
            row |= {"prompt": PHRASING.format(problem.first, problem.second), "id": f"{row['id']} in words"}
        rows.append(row)
    return rows


def draw_rows(seed: int) -> Mapping[str, Rows]:
    """Draw every set of the task. No two sets, and no two rows of one, add the same two numbers in the same order."""
    rng = random.Random(seed)
    taken: list[Addition] = []

    def draw(counts: Mapping[int, int], num_digits: int = 3) -> list[Addition]:
        drawn = draw_problems(counts, rng, exclude=taken, num_digits=num_digits)
        taken.extend(drawn)
        return drawn

    sets = {name: rows_of(draw(counts)) for name, counts in (("validation", VALIDATION), ("heldout", HELDOUT))}
    sets["longer"] = rows_of(draw(LONGER, num_digits=4))
    sets["phrasing"] = rows_of(draw(PHRASED), is_phrased=True)
    sets["train"] = rows_of(draw(TRAIN))
    warmup = rows_of(draw(WARMUP))
    warmup += rows_of(draw(WARMUP_SHORT, num_digits=2)) + rows_of(draw(WARMUP_LONGER, num_digits=4))
    warmup += rows_of(draw(WARMUP_PHRASED), is_phrased=True)
    rng.shuffle(warmup)
    return {**sets, "warmup": warmup}
