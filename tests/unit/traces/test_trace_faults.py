"""Faults while traces are made: each is reported in a line, no response is lost, and none is asked for twice."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.traces.client import Turns
from tests.support.fake_sglang import FakeSGLang, Reply, wait_until
from tests.support.tool_commands import TOOLS
from tests.support.trace_cases import (
    always_right,
    chat,
    generate,
    question,
    read_lines,
    records,
    right,
    status,
    write_prompts,
    write_teachers,
)


def has_all_traces(folder: Path, teacher: str = "t") -> bool:
    return all(teacher in row.get("traces", {}) for row in read_lines(folder / "out.jsonl"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_was_ended_goes_on_and_asks_nothing_twice(how: signal.Signals, tmp_path: Path) -> None:
    os.umask(0o022)
    write_prompts(tmp_path / "in.jsonl", 6)
    recorded = tmp_path / "out.jsonl.records" / "t.jsonl"

    def plan(index: int, body: dict[str, Any]) -> Reply:
        return chat(right(body)) if index < 4 else "hang"

    with FakeSGLang(plan) as fake:
        teachers = write_teachers(tmp_path / "teachers.yaml", {"t": {"urls": [fake.url]}})
        arguments = [tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--teachers", teachers]
        command = [sys.executable, TOOLS / "generate_traces.py", *arguments]
        with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: recorded.exists() and recorded.read_bytes().count(b"\n") == 4, "4 records", 120)
            process.send_signal(how)
            errors = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else Cause.STOPPED.status)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (recorded.parent, *recorded.parent.iterdir())}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}, "only this user can read them"
    assert ("4 responses are recorded" in errors) is (how is signal.SIGTERM)
    assert not (tmp_path / "out.jsonl").exists()
    done = {question(body) for body in fake.requests[:4]}
    with recorded.open("ab") as file:
        file.write(b'{"key": "cut o')
    with FakeSGLang(always_right) as again:
        generate(tmp_path, {"t": {"urls": [again.url]}})
    assert len(again.requests) == 2
    assert not done & {question(body) for body in again.requests}
    assert has_all_traces(tmp_path)


def test_a_finished_file_is_written_again_without_any_server(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 2)
    with FakeSGLang(always_right) as fake:
        teachers = {"t": {"urls": [fake.url]}}
        before = generate(tmp_path, teachers)
    content = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    assert generate(tmp_path, teachers) == before
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_rows_that_move_or_come_anew_keep_the_responses_of_the_others(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 3)
    with FakeSGLang(always_right) as fake:
        generate(tmp_path, {"t": {"urls": [fake.url]}})
    lines = write_prompts(tmp_path / "more.jsonl", 5).read_text().splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_text("".join(lines[:0:-1]))
    with FakeSGLang(always_right) as again:
        generate(tmp_path, {"t": {"urls": [again.url]}})
    assert {question(body) for body in again.requests} == {"What is 3 + 3?", "What is 4 + 4?"}
    assert has_all_traces(tmp_path)


def test_a_pause_that_the_server_asks_for_costs_no_attempt(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 1)
    with FakeSGLang(lambda index, body: status(429, Retry_After="0") if index == 0 else chat(right(body))) as fake:
        generate(tmp_path, {"t": {"urls": [fake.url], "retries": 0}})
    assert has_all_traces(tmp_path)


@pytest.mark.parametrize("end", ["86400", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_pause_longer_than_a_response_may_take_ends_the_teacher_at_once(end: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 4)
    with (
        FakeSGLang(lambda index, body: status(503, Retry_After=end)) as fake,
        pytest.raises(RunEnded, match=r"asks for a pause of \d{5,} s, over request_deadline_s=20"),
    ):
        generate(tmp_path, {"t": {"urls": [fake.url], "max_in_flight": 1}})
    assert len(fake.requests) == 1


def test_turns_keep_their_distance_and_wait_for_the_end_of_a_pause() -> None:
    now = [100.0]
    turns = Turns(4.0, clock=lambda: now[0])
    assert [turns.reserve() for _ in range(4)] == [0.0, 0.25, 0.5, 0.75]
    turns.hold(10)
    assert turns.is_held
    assert [turns.reserve() for _ in range(3)] == [10.0, 10.25, 10.5]
    now[0] = 110.0
    assert not turns.is_held
    assert turns.reserve() == 0.75
    free = Turns(None, clock=lambda: now[0])
    assert [free.reserve() for _ in range(3)] == [0.0, 0.0, 0.0]


def test_a_server_that_goes_ends_its_teacher_alone_and_the_next_call_goes_on(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 4)
    with (
        FakeSGLang(lambda index, body: chat(right(body)) if index < 2 else "die") as gone,
        FakeSGLang(lambda index, body: chat(right(body, "Then"))) as other,
    ):
        teachers: dict[str, dict[str, Any]] = {
            "t": {"urls": [gone.url], "max_in_flight": 1, "retries": 1},
            "u": {"urls": [other.url]},
        }
        with pytest.raises(RunEnded, match="teacher t was given up: no SGLang server is left") as ended:
            generate(tmp_path, teachers)
    assert ended.value.cause is Cause.SERVERS_GONE
    assert len(records(tmp_path / "out.jsonl", "t")) == 2
    assert sum("t" in row["traces"] for row in read_lines(tmp_path / "out.jsonl")) == 2
    assert has_all_traces(tmp_path, "u")
    with FakeSGLang(always_right) as back:
        generate(tmp_path, {**teachers, "t": {"urls": [back.url]}})
    assert len(back.requests) == 2
    assert has_all_traces(tmp_path)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda body: web.json_response({"choices": []}), "no response as OpenAI's chat API gives it"),
        (lambda body: web.Response(text="<html>"), "no JSON"),
        (status(500), "HTTP 500"),
        (chat("bad", "content_filter"), "content_filter"),
    ],
)
def test_a_teacher_that_answers_garbage_is_given_up_after_16_responses(answer: Any, match: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 30)
    with FakeSGLang(lambda index, body: answer) as fake, pytest.raises(RunEnded, match=match):
        generate(tmp_path, {"t": {"urls": [fake.url]}})
    assert 16 <= len(fake.requests) <= 17
    assert records(tmp_path / "out.jsonl", "t") == []


def test_a_key_that_is_refused_ends_the_teacher_at_once_and_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prompts(tmp_path / "in.jsonl", 8)
    monkeypatch.setenv("TEACHER_KEY", "secret")
    with FakeSGLang(lambda index, body: status(401)) as fake, pytest.raises(RunEnded) as ended:
        generate(tmp_path, {"t": {"urls": [fake.url], "api_key_env": "TEACHER_KEY", "max_in_flight": 1, "retries": 5}})
    assert len(fake.requests) == 1
    assert "HTTP 401" in str(ended.value)
    assert "set TEACHER_KEY" in str(ended.value)
    assert "secret" not in str(ended.value)


def test_a_prompt_that_is_refused_for_good_is_recorded_and_not_asked_again(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 2)
    for _ in range(2):
        with FakeSGLang(lambda index, body: "400" if "0 + 0" in question(body) else chat(right(body))) as fake:
            report = generate(tmp_path, {"t": {"urls": [fake.url]}})
        assert report["teachers"]["t"]["refused"] == 1
        assert report["teachers"]["t"]["prompts_left"] == 0
    assert fake.requests == []
    (refused,) = [one for one in records(tmp_path / "out.jsonl", "t") if one["refused"]]
    assert "the prompt is too long" in refused["error"]


def test_nothing_is_asked_where_a_teacher_cannot_be_reached_at_the_start(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 2)
    with FakeSGLang(always_right) as fake:
        teachers: dict[str, dict[str, Any]] = {"up": {"urls": [fake.url]}, "down": {"urls": ["http://127.0.0.1:9"]}}
        teachers["keyless"] = {"urls": [fake.url], "api_key_env": "NO_SUCH_KEY"}
        with pytest.raises(ValueError, match="down") as error:
            generate(tmp_path, teachers)
    assert "teachers.down: http://127.0.0.1:9/v1: nothing answers there" in str(error.value)
    assert "teachers.keyless: the environment variable NO_SUCH_KEY is not set" in str(error.value)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"prompt": "What is 1 + 1?"}, "answer: is missing"),
        ({"prompt": "What is 1 + 1?", "answer": {"a": 1}}, "must be text for the verifier exact"),
        ({"prompt": "What is 1 + 1?", "answer": "2", "verifier": "os:system"}, "a row may name math, exact, choice"),
        ("What is 1 + 1?", "must be an object"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named_before_anything_is_asked(row: Any, rule: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 2)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with FakeSGLang(always_right) as fake, pytest.raises(ValueError, match="1 bad row in the prompt file") as error:
        generate(tmp_path, {"t": {"urls": [fake.url]}})
    assert f"{tmp_path / 'in.jsonl'}:3: " in str(error.value)
    assert rule in str(error.value)
    assert fake.requests == []


def test_records_of_another_setting_are_refused(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 1)
    with FakeSGLang(always_right) as fake:
        generate(tmp_path, {"t": {"urls": [fake.url]}})
        generate(tmp_path, {"t": {"urls": [fake.url], "samples": 8, "price_in": 1.0}})
        with pytest.raises(ValueError, match=r"temperature was 0\.6, now 1\.0"):
            generate(tmp_path, {"t": {"urls": [fake.url], "temperature": 1.0}})
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"urls": []}, "name at least one"),
        ({"urls": ["http://h:1/v1?key=x"]}, "must have neither a query nor a fragment|and nothing more"),
        ({"urls": ["http://h:1"], "keep": 4}, "keep=4: must be at most 3: samples=3"),
        ({"urls": ["http://h:1"], "temprature": 1}, "did you mean .*temperature"),
        ({"urls": ["http://h:1"], "api_key_env": "sk-12345"}, "must be the name of an environment variable"),
        ({"urls": ["http://h:1"], "requests_per_s": 0.0}, "must be positive"),
    ],
)
def test_a_bad_key_of_a_teacher_is_named_with_its_rule(keys: dict[str, Any], rule: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 1)
    with pytest.raises(ValueError, match=rule) as error:
        generate(tmp_path, {"t": keys})
    assert "teachers.t" in str(error.value)
    assert "sk-12345" not in str(error.value)


def test_the_prompt_file_is_never_the_output(tmp_path: Path) -> None:
    content = write_prompts(tmp_path / "in.jsonl", 1).read_bytes()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match="is the prompt file itself"):
        generate(tmp_path, {"t": {"urls": ["http://127.0.0.1:9"]}})
    assert (tmp_path / "in.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("[]", "must be an object with key, id"),
        ('{"key": 1}', "must be an object with key, id"),
        ("{", "not a JSON object"),
    ],
)
def test_a_record_that_was_written_by_another_hand_is_named_with_its_line(line: str, rule: str, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 1)
    with FakeSGLang(always_right) as fake:
        generate(tmp_path, {"t": {"urls": [fake.url]}})
    with (tmp_path / "out.jsonl.records" / "t.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: {rule}"):
        generate(tmp_path, {"t": {"urls": [fake.url]}})
