"""The config that ``megatron-dypo init`` writes: the keys that a task usually sets, each with its comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dypo.config.reading.load import flow_yaml
from megatron_dypo.config.reference import Key, Section, sections

_COMMON: Mapping[str, Any] = {
    "run.dir": "runs/my_run",
    "run.steps": 200,
    "model.hf_path": "models/my_model",
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "data.prompts": ["data/train.jsonl"],
    "data.max_prompt_tokens": 1024,
    "data.max_trace_tokens": 8192,
    "rollout.group_size": 8,
    "rollout.prompts_per_round": 128,
    "rollout.max_new_tokens": 8192,
    "rollout.servers.per_node": 1,
    "rollout.servers.tensor_parallel": 1,
    "batching.prompts_per_update": 128,
    "batching.tokens_per_microbatch": 16384,
    "optimizer.lr": 1e-6,
    "optimizer.warmup_steps": 10,
    "checkpoint.every": 50,
    "eval.sets": {"held_out": {"path": "data/held_out.jsonl"}},
    "eval.every": 20,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of task, and the values that it sets besides the common ones."""

    text: str
    values: Mapping[str, Any]
    leaves_out: tuple[str, ...] = ()
    """Common keys, or beginnings of keys, that the task has no use for."""


TASKS: Mapping[str, Task] = {
    "math": Task(
        text="mathematics with a final answer, compared as numbers and formulas",
        values={"grading.verifier": "math", "grading.answer_format": "auto", "objective.name": "dypo"},
    ),
    "choice": Task(
        text="multiple-choice questions, answered by a letter",
        values={"grading.verifier": "choice", "objective.name": "dypo", "rollout.max_new_tokens": 2048},
    ),
    "exact": Task(
        text="short answers, compared as texts",
        values={"grading.verifier": "exact", "objective.name": "dypo", "rollout.max_new_tokens": 2048},
    ),
    "own": Task(
        text="a verifier of your own: a Python function",
        values={"grading.verifier": "my_verifier:verify", "grading.deadline_s": 10.0, "objective.name": "dypo"},
    ),
    "sft": Task(
        text="supervised training on teachers' traces, without servers",
        values={"objective.name": "sft"},
        leaves_out=("rollout.group_size", "rollout.max_new_tokens", "rollout.servers.", "eval."),
    ),
}
"""The tasks of ``megatron-dypo init --task``."""


def starter_config(task: str, *, all_keys: bool = False) -> str:
    """Return a commented YAML config for a task.

    Args:
        task: a key of :data:`TASKS`.
        all_keys: list every other key as well, commented out with its default.
    """
    chosen = TASKS[task]
    common = {key: value for key, value in _COMMON.items() if not key.startswith(chosen.leaves_out)}
    values = {**common, **chosen.values}
    lines = [
        f"# A config for {chosen.text}.",
        f"# Written by `megatron-dypo init --task {task}`.",
        "# Every key that is not set here has its default; `megatron-dypo config` explains all of them.",
        "# Check the data with `megatron-dypo check`, and the whole with `megatron-dypo train CONFIG --dry-run`.",
    ]
    known = sections()
    for section in known:
        if "." not in section.path and (all_keys or any(key.startswith(f"{section.path}.") for key in values)):
            lines.append("")
            lines += _section_lines(section, known, values, all_keys, depth=0)
    return "\n".join(lines) + "\n"


def _section_lines(
    section: Section, known: tuple[Section, ...], values: Mapping[str, Any], all_keys: bool, *, depth: int
) -> Iterator[str]:
    """Yield the lines of a section. A section that sets no value is commented out as a whole."""
    is_set = any(key.startswith(f"{section.path}.") for key in values)
    yield f"{'  ' * depth}{'' if is_set else '# '}{section.path.rpartition('.')[2]}:"
    for key in section.keys:
        if key.path in values or all_keys:
            yield from _key_lines(key, values, "  " * (depth + 1))
    for inner in known:
        if inner.path.rpartition(".")[0] == section.path and (
            all_keys or any(key.startswith(f"{inner.path}.") for key in values)
        ):
            yield from _section_lines(inner, known, values, all_keys, depth=depth + 1)


def _key_lines(key: Key, values: Mapping[str, Any], indent: str) -> Iterator[str]:
    name = key.path.rpartition(".")[2]
    yield from textwrap.wrap(key.text, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    if key.path in values:
        yield f"{indent}{name}: {flow_yaml(values[key.path])}"
    else:
        yield f"{indent}# {name}: {flow_yaml(key.plain_default())}"
