"""Traces of teachers: right responses are kept, each once; records count all responses; rows are not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dypo.config.data import DataFieldsConfig
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.source import RowSource
from tests.support.fake_sglang import FakeSGLang, Reply
from tests.support.trace_cases import always_right, chat, generate, question, read_lines, records, right, write_prompts


def test_the_first_right_response_that_ends_on_its_own_becomes_the_trace(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 2, level=3)

    def plan(index: int, body: dict[str, Any]) -> Reply:
        if question(body).startswith("What is 0"):
            return chat(r"\boxed{77}", tokens=3)
        return [chat(right(body), "length"), chat(r"\boxed{7}"), chat(right(body, "Well"), tokens=9)][
            sum(question(one) == question(body) for one in fake.requests) - 1
        ]

    with FakeSGLang(plan) as fake:
        report = generate(tmp_path, {"Org/T": {"urls": [fake.url], "max_tokens": 64, "temperature": 0.25}})
    first, second = read_lines(tmp_path / "out.jsonl")
    assert first == {"prompt": "What is 0 + 0?", "answer": "0", "source": "sums", "level": 3}
    assert second["traces"] == {"Org/T": r"Well \boxed{2}"}
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in fake.requests} == {("m", 0.25, 64)}
    assert len({body["seed"] for body in fake.requests}) == len(fake.requests) == 6
    counts = report["teachers"]["Org/T"]
    assert (counts["asked"], counts["right"], counts["wrong"], counts["truncated"]) == (6, 1, 4, 1)
    assert counts["kept_tokens"]["median"] == 9


def test_the_output_is_read_back_as_training_data_with_ids_columns_and_older_traces(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    row = {"id": "sum-1", "prompt": [{"role": "user", "content": "What is 1 + 1?"}], "answer": 2, "verifier": "math"}
    path.write_text(json.dumps({**row, "traces": {"old": "It is 2."}, "level": [1, 2]}) + "\n")
    with FakeSGLang(always_right) as fake:
        generate(tmp_path, {"t": {"urls": [fake.url]}})
    source = RowSource([tmp_path / "out.jsonl"], columns_of("plain", DataFieldsConfig()), keep_row=True)
    read = source.row(0)
    source.close()
    assert (read.prompt_id, read.answer, read.verifier, read.source) == ("sum-1", "2", "math", "in")
    assert read.prompt == row["prompt"]
    assert read.traces == {"old": "It is 2.", "t": r"So \boxed{2}"}
    assert read.row == {"level": [1, 2]}


def test_a_row_that_has_a_trace_of_the_teacher_is_not_asked(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 1, traces={"t": "It is 0."})
    report = generate(tmp_path, {"t": {"urls": ["http://127.0.0.1:9"]}})
    assert read_lines(tmp_path / "out.jsonl")[0]["traces"] == {"t": "It is 0."}
    assert report["teachers"]["t"]["asked"] == 0


def test_a_prompt_that_several_rows_have_is_asked_once_and_serves_all_of_them(tmp_path: Path) -> None:
    one = {"prompt": "What is 1 + 1?", "answer": "2"}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({**one, "place": i}) + "\n" for i in range(3)))
    with FakeSGLang(always_right) as fake:
        report = generate(tmp_path, {"t": {"urls": [fake.url]}})
    assert len(fake.requests) == 1
    assert [(row["place"], row["traces"]) for row in read_lines(tmp_path / "out.jsonl")] == [
        (i, {"t": r"So \boxed{2}"}) for i in range(3)
    ]
    assert (report["rows"], report["prompts"]) == (3, 1)


def test_no_row_gets_one_text_twice(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 1)
    words = iter(["So", " So ", "Then"])
    with FakeSGLang(lambda index, body: chat(right(body, next(words)))) as fake, FakeSGLang(always_right) as copy:
        report = generate(tmp_path, {"a": {"urls": [fake.url], "keep": 2}, "b": {"urls": [copy.url]}})
    assert read_lines(tmp_path / "out.jsonl")[0]["traces"] == {"a": r"So \boxed{0}", "a#2": r"Then \boxed{0}"}
    assert report["teachers"]["a"]["duplicates"] == 1
    assert report["teachers"]["b"]["same_as_another_teachers"] == 1


def test_the_report_is_what_the_records_say(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 6)

    def knows(*numbers: int) -> Any:
        def plan(index: int, body: dict[str, Any]) -> Reply:
            is_known = int(question(body).split()[2]) in numbers
            return chat(right(body, fakes[numbers]) if is_known else r"\boxed{77}", tokens=10 * (index + 1))

        return plan

    fakes = {(0, 1, 2, 3): "a:", (2, 3, 4): "b:"}
    with FakeSGLang(knows(0, 1, 2, 3)) as a, FakeSGLang(knows(2, 3, 4)) as b:
        prices = {"price_in": 2.0, "price_out": 1000.0}
        report = generate(tmp_path, {"a": {"urls": [a.url], **prices}, "b": {"urls": [b.url], "samples": 1}})
    for name in "ab":
        kept = records(tmp_path / "out.jsonl", name)
        one = report["teachers"][name]
        assert one["asked"] == len(kept)
        assert one["right"] == sum(record["correct"] for record in kept)
        assert one["num_tokens"] == sum(record["num_tokens"] for record in kept)
        assert one["kept_tokens"]["max"] == max(record["num_tokens"] for record in kept if record["correct"])
    assert len(a.requests) == 4 + 2 * 3
    assert report["teachers"]["a"]["cost"] == (10 * 7 * 2.0 + sum(range(10, 101, 10)) * 1000.0) / 1e6
    assert [report["teachers"][name]["prompts_alone"] for name in "ab"] == [2, 1]
    assert report["prompts_with_trace"] == 5
    assert report["agreement"] == [
        {
            "teachers": ["a", "b"],
            "prompts": 6,
            "both_right": 2,
            "only_first": 2,
            "only_second": 1,
            "neither": 1,
            "agree": 0.5,
        }
    ]
    assert json.loads((tmp_path / "out.jsonl.records" / "report.json").read_text()) == report


def test_no_more_requests_are_open_than_the_teacher_allows_and_keys_are_sent_to_their_own(
    tmp_path: Path, monkeypatch: Any
) -> None:
    write_prompts(tmp_path / "in.jsonl", 12)
    monkeypatch.setenv("KEY_OF_A", "secret-a")
    with FakeSGLang(always_right) as a, FakeSGLang(always_right) as b:
        teachers: dict[str, dict[str, Any]] = {
            "a": {"urls": [a.url], "api_key_env": "KEY_OF_A", "max_in_flight": 3},
            "b": {"urls": [b.url]},
        }
        generate(tmp_path, teachers)
    assert a.max_open <= 3
    assert set(a.authorization) == {"Bearer secret-a"}
    assert set(b.authorization) == {None}
    for path in (tmp_path / "out.jsonl.records").iterdir():
        assert "secret-a" not in path.read_text()


def test_requests_begin_no_faster_than_the_rate_of_their_teacher(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in.jsonl", 6)
    with FakeSGLang(always_right) as fake:
        generate(tmp_path, {"t": {"urls": [fake.url], "requests_per_s": 10.0, "max_in_flight": 6}})
    # Five gaps of 0.1 s; the first request may come late.
    assert fake.arrivals[-1] - fake.arrivals[0] >= 0.25
