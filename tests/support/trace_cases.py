"""Prompt files, teachers and answers for tests of ``megatron_dypo.traces``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_dypo.config.reading.load import load_tree
from megatron_dypo.traces.config import TraceCommandConfig
from megatron_dypo.traces.run import generate_traces, records_folder
from tests.support.fake_sglang import Reply

QUICK: dict[str, Any] = {"model": "m", "retries": 0, "request_deadline_s": 20.0, "max_in_flight": 2, "samples": 3}
"""Keys of a test's teacher, without its URLs."""


def write_prompts(path: Path, count: int = 3, **columns: Any) -> Path:
    """Write ``count`` sums; the answer to ``What is i + i?`` is 2i."""
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "source": "sums", **columns} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def records(out: Path, teacher: str) -> list[dict[str, Any]]:
    """Return the records of a teacher."""
    return read_lines(records_folder(out) / f"{teacher}.jsonl")


def question(body: dict[str, Any]) -> str:
    """Return the prompt of a request."""
    return str(body["messages"][-1]["content"])


def right(body: dict[str, Any], words: str = "So") -> str:
    """Return the right response to a sum."""
    return f"{words} \\boxed{{{2 * int(question(body).split()[2])}}}"


def chat(text: str, finish: str = "stop", *, tokens: int = 5) -> Callable[[dict[str, Any]], web.Response]:
    """Answer a request with this text."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"completion_tokens": tokens, "prompt_tokens": 7}
    return lambda _: web.json_response({"choices": [choice], "usage": usage})


def status(number: int, **headers: str) -> Callable[[dict[str, Any]], web.Response]:
    """Answer a request with a status and headers (``Retry_After``)."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: web.Response(status=number, text="not so", headers=given)


def always_right(index: int, body: dict[str, Any]) -> Reply:
    """The plan of a teacher that is always right."""
    return chat(right(body))


def write_teachers(path: Path, teachers: dict[str, dict[str, Any]], **sections: Any) -> Path:
    """Write the file of teachers; each is ``QUICK`` with its own keys."""
    tree = {
        "teachers": {name: {**QUICK, **own} for name, own in teachers.items()},
        "grading": {"verifier": "exact", "workers": 1},
        **sections,
    }
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


def generate(folder: Path, teachers: dict[str, dict[str, Any]], **sections: Any) -> dict[str, Any]:
    """Make ``out.jsonl`` from ``in.jsonl`` of a folder; return the report."""
    cfg = load_tree(TraceCommandConfig, write_teachers(folder / "teachers.yaml", teachers, **sections))
    return generate_traces(folder / "in.jsonl", folder / "out.jsonl", cfg, show_progress=False)
