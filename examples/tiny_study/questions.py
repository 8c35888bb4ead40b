"""The task of the confirmation: the additions of examples/smollm2_135m, asked in words of a pretrained model.

Its other phrasing is one that training never has, and its longer numbers have three digits.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

Rows = list[dict[str, object]]

FOLDER = Path(__file__).resolve().parents[1] / "smollm2_135m"
PHRASING = "Please compute the sum of {} and {}."
NUM_VALIDATION, NUM_HELDOUT, NUM_TRAIN, NUM_PHRASED, NUM_LONGER = 100, 100, 1000, 50, 50


def _load_task() -> ModuleType:
    """Load the example's ``task.py``, whose name another example has too."""
    name = "smollm2_135m_task"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclass looks for its own annotations
    spec.loader.exec_module(module)
    return module


def draw_rows(seed: int) -> Mapping[str, Rows]:
    """Draw every set of the task. No two sets, and no two rows of one, add the same two numbers in the same order."""
    task, rng = _load_task(), random.Random(seed)
    counts = [NUM_VALIDATION, NUM_HELDOUT, NUM_TRAIN, NUM_PHRASED]
    validation, heldout, train, asked = task.draw_questions(counts, rng)
    phrased = [task.Question(one.first, one.second, PHRASING) for one in asked]
    pairs = rng.sample([(first, second) for first in range(100, 1000) for second in range(10, 100)], NUM_LONGER)
    longer = [task.Question(first, second, rng.choice(task.WORDINGS)) for first, second in pairs]
    sets = {"validation": validation, "heldout": heldout, "longer": longer, "phrasing": phrased, "train": train}
    return {name: [task.prompt_row(question) for question in questions] for name, questions in sets.items()}
