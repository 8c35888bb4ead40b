"""Write the inputs of a task: the sets of ``data/``, the model, and the warm start that every cell begins with."""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
from model import VOCABULARY, write_model
from whole_job.stages import ROOT, Stages, command, script

from megatron_dypo.fs import new_file
from tiny_study import additions, questions, sorting

Rows = list[dict[str, object]]
SETS = ("validation", "heldout", "longer", "phrasing", "train", "warmup")
TOKENS = (*VOCABULARY, " ", *string.ascii_lowercase)
"""Tokens of the study's model: the quickstart's, and those of words."""
WARMUP_CONFIG = "examples/quickstart/warmup.yaml"
MODEL_SCRIPT = "examples/smollm2_135m/model.py"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the study."""

    draw_rows: Callable[[int], Mapping[str, Rows]]
    """Seed → the rows of each set."""
    teachers: tuple[str, ...]
    """The teachers that methods learn from."""
    warmup_steps: int = 0
    """Steps of the warm start."""
    is_pretrained: bool = False
    """The model is SmolLM2 instead of the quickstart's with a warm start."""


TASKS: Mapping[str, Task] = {
    "additions": Task(draw_rows=additions.draw_rows, teachers=("columns", "glance"), warmup_steps=1500),
    "sorting": Task(draw_rows=sorting.draw_rows, teachers=("insertion", "ranks"), warmup_steps=900),
    "questions": Task(draw_rows=questions.draw_rows, teachers=("tens_and_ones", "two_steps"), is_pretrained=True),
}


def data_path(folder: Path, name: str) -> Path:
    """Return the file of a set; ``folder`` is the task's."""
    return folder / "data" / f"{name}.jsonl"


def start_path(folder: Path, task: Task) -> Path:
    """Return the HF folder of the model that every cell of a task begins with."""
    return folder / "model" if task.is_pretrained else folder / "warmup" / "hf"


def write_data(folder: Path, task: Task, seed: int) -> None:
    """Write the file of each set. Each appears once it is complete."""
    for name, rows in task.draw_rows(seed).items():
        path = data_path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            for row in rows:
                file.write(f"{json.dumps(row)}\n".encode())
        print(f"{path}: {len(rows)} prompts, the first is {rows[0]['prompt']}")


def make_inputs(out: Path, name: str, stages: Stages, seed: int, extra: tuple[str, ...] = ()) -> None:
    """Write data and model of a task, and train its warm start, as far as that is not done.

    Args:
        out: folder of the study, from the repository's root.
        extra: ``section.key=value`` … for the warm start.
    """
    task, folder = TASKS[name], out / name
    stages.run(f"{name}: data", lambda: write_data(ROOT / folder, task, seed))
    if task.is_pretrained:
        stages.run(f"{name}: model", lambda: script(MODEL_SCRIPT, str(folder / "model")))
        return
    stages.run(f"{name}: model", lambda: print(f"{write_model(ROOT / folder / 'model', seed, TOKENS):,} parameters"))
    changes = [*warmup_overrides(folder, task, seed), *extra]
    stages.run(f"{name}: warm start", lambda: command("train", WARMUP_CONFIG, *changes))


def warmup_overrides(folder: Path, task: Task, seed: int) -> list[str]:
    """Return the overrides of the quickstart's warm start; its optimizer and batches stay."""
    return [
        f"run.dir={folder}/warmup",
        f"run.steps={task.warmup_steps}",
        f"run.seed={seed}",
        f"model.hf_path={folder}/model",
        f"data.prompts=[{data_path(folder, 'warmup')}]",
        f"data.teachers=[{', '.join(task.teachers)}]",
        "parallel.pipeline=1",
        "checkpoint.every=0",
    ]
