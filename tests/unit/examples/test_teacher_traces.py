"""Sampling a teacher: right responses become traces, an interrupted run goes on, and a refusal is an error."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from aiohttp import web
from typer.testing import CliRunner

from tests.support.fake_sglang import FakeSGLang

PATH = Path(__file__).parents[3] / "examples" / "teacher_traces.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("teacher_traces", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["teacher_traces"] = module
    spec.loader.exec_module(module)
    return module


def chat(*contents: tuple[str, str]) -> Any:
    """Answer a request with these (text, finish_reason)."""
    choices = [
        {"message": {"role": "assistant", "content": text}, "finish_reason": reason} for text, reason in contents
    ]
    return lambda body: web.json_response({"choices": choices})


def add(script: Any, folder: Path, url: str, *options: str) -> Any:
    app = typer.Typer()
    app.command()(script.main)
    arguments = [
        str(folder / "in.jsonl"),
        str(folder / "out.jsonl"),
        "--url",
        url,
        "--teacher",
        "Org/Teacher",
        *options,
    ]
    return CliRunner().invoke(app, arguments)


def write_rows(folder: Path, count: int) -> None:
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "source": "sums"} for i in range(count)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_first_right_and_finished_response_becomes_the_trace(script: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 2)

    def plan(index: int, body: dict[str, Any]) -> Any:
        if body["messages"][0]["content"] == "What is 0 + 1?":
            return chat(
                (r"cut \boxed{1}", "length"), (r"\boxed{7}", "stop"), (r"so \boxed{1}", "stop"), (r"\boxed{1}", "stop")
            )
        return chat((r"\boxed{7}", "stop"))

    with FakeSGLang(plan) as fake:
        done = add(script, tmp_path, fake.url, "--attempts", "4", "--temperature", "0.5", "--max-tokens", "64")
    assert done.exit_code == 0, done.output
    first, second = read_rows(tmp_path)
    assert first["traces"] == {"Org/Teacher": r"so \boxed{1}"}
    assert "traces" not in second
    assert second["source"] == "sums"
    asked = fake.requests[0]
    assert (asked["n"], asked["temperature"], asked["max_tokens"]) == (4, 0.5, 64)
    assert "1 with a trace of Org/Teacher" in done.output


def test_a_call_after_an_interruption_asks_only_for_the_rows_that_are_missing(script: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 3)
    whole = json.dumps({"prompt": "What is 0 + 1?", "answer": "1", "traces": {"other": "1"}})
    (tmp_path / "out.jsonl").write_text(f'{whole}\n{{"prompt": "What is 1', encoding="utf-8")
    with FakeSGLang(lambda index, body: chat((r"\boxed{2}", "stop"))) as fake:
        assert add(script, tmp_path, fake.url).exit_code == 0
    assert sorted(body["messages"][0]["content"] for body in fake.requests) == ["What is 1 + 1?", "What is 2 + 1?"]
    rows = read_rows(tmp_path)
    assert [row["prompt"] for row in rows] == ["What is 0 + 1?", "What is 1 + 1?", "What is 2 + 1?"]
    assert [row.get("traces") for row in rows] == [{"other": "1"}, {"Org/Teacher": r"\boxed{2}"}, None]


def test_without_a_verifier_the_first_response_is_kept_and_the_key_is_sent(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path, 1)
    monkeypatch.setenv("DYPO_SGLANG_API_KEY", "secret")
    with FakeSGLang(lambda index, body: chat(("who knows", "stop"))) as fake:
        assert add(script, tmp_path, fake.url, "--verifier", "none").exit_code == 0
    assert fake.authorization == ["Bearer secret"]
    assert read_rows(tmp_path)[0]["traces"] == {"Org/Teacher": "who knows"}


def test_a_request_that_the_server_refuses_ends_the_script_with_its_words(script: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, 1)
    with FakeSGLang(lambda index, body: "400") as fake:
        done = add(script, tmp_path, fake.url)
    assert isinstance(done.exception, ValueError)
    assert "status 400" in str(done.exception)
    assert "the prompt is too long" in str(done.exception)
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == ""
