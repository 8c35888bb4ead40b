"""``megatron-dypo eval`` against fake servers: requests, records, counts, and continuing after a stop."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megatron_dypo.config.eval_command import EvalCommandConfig
from megatron_dypo.config.reading.load import load_tree
from megatron_dypo.ending import RunEnded
from megatron_dypo.eval.records import Record, read_records, records_path
from tests.support.eval_cases import chat, often_right, run_eval, sglang, write_sums, write_tokenizer_folder
from tests.support.fake_sglang import FakeSGLang

ITEMS, SAMPLES = 6, 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer_folder(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl", ITEMS)
    return tmp_path


def sums(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"sums": {"path": str(folder / "sums.jsonl"), **keys}}


def records(out: Path, name: str = "sums") -> dict[tuple[str, int], Record]:
    return {(record.item, record.sample): record for record in read_records(records_path(out, name))}


def plan(folder: Path, *, dies_at: int = 10**9) -> Any:
    reply = sglang(often_right, folder / "model")
    return lambda index, body: reply if index < dies_at else "die"


def test_the_summary_counts_what_the_records_say(folder: Path) -> None:
    with FakeSGLang(plan(folder)) as fake:
        summary = run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))
    found = records(folder / "out")
    assert len(found) == ITEMS * SAMPLES
    gold = {f"sum-{i}": str(8 * i) for i in range(ITEMS)}
    for record in found.values():
        assert record.correct == (record.answer == gold[record.item]), record
        assert record.response == f"It is \\boxed{{{record.answer}}}"
        assert record.num_tokens == len(record.response) + 1
    figures = summary["sets"]["sums"]
    right = Counter(record.item for record in found.values() if record.correct)
    assert figures["avg"] == pytest.approx(sum(right.values()) / (ITEMS * SAMPLES), abs=1e-12)
    assert figures["pass@k"]["3"] == pytest.approx(len(right) / ITEMS, abs=1e-12)
    assert 0 < figures["avg"] < 1, "the case is of use only if some are right and some wrong"
    assert (figures["items"], figures["samples"], figures["lost"]) == (ITEMS, ITEMS * SAMPLES, 0)
    assert set(figures["by_source"]) == {"even", "odd"}
    assert json.loads((folder / "out" / "summary.json").read_text()) == summary
    page = (folder / "out" / "report.html").read_text()
    assert f"{figures['avg']:.1%}" in page
    assert "sum-5" in page


def test_an_evaluation_that_was_cut_off_goes_on_to_the_figures_of_one_in_one_go(folder: Path) -> None:
    whole, cut = folder / "whole", folder / "cut"
    with FakeSGLang(plan(folder)) as fake:
        expected = run_eval(folder, whole, sums(folder), urls=(fake.url,))
    with (
        FakeSGLang(plan(folder, dies_at=7)) as fake,
        pytest.raises(RunEnded, match=r"(?s)no SGLang server is left.*of 18 responses are recorded"),
    ):
        run_eval(folder, cut, sums(folder), urls=(fake.url,), rollout={"max_in_flight": 1})
    before = records(cut)
    assert len(before) == 7
    with FakeSGLang(plan(folder)) as fake:
        assert run_eval(folder, cut, sums(folder), urls=(fake.url,)) == expected
    assert len(fake.requests) == ITEMS * SAMPLES - 7, "a response that has a record is not asked for again"
    assert records(cut) == records(whole)
    assert before.items() <= records(cut).items()


def test_a_finished_evaluation_asks_nobody(folder: Path) -> None:
    with FakeSGLang(plan(folder)) as fake:
        first = run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))
    # Nothing listens at that port any more.
    assert run_eval(folder, folder / "out", sums(folder), urls=(fake.url,)) == first


def test_more_samples_are_added_to_those_that_are_there(folder: Path) -> None:
    with FakeSGLang(plan(folder)) as fake:
        run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))
        summary = run_eval(folder, folder / "out", sums(folder, samples_per_prompt=5), urls=(fake.url,))
        fewer = run_eval(folder, folder / "out", sums(folder, samples_per_prompt=1), urls=(fake.url,))
    assert len(fake.requests) == ITEMS * 5
    assert (summary["sets"]["sums"]["samples"], fewer["sets"]["sums"]["samples"]) == (ITEMS * 5, ITEMS)


def test_records_of_other_settings_are_refused(folder: Path) -> None:
    with FakeSGLang(plan(folder)) as fake:
        run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))
        with pytest.raises(ValueError, match=r"sums.jsonl: .* temperature was 0.6, now 0.0"):
            run_eval(folder, folder / "out", sums(folder, temperature=0.0), urls=(fake.url,))
        write_sums(folder / "sums.jsonl", ITEMS + 1)
        with pytest.raises(ValueError, match="file_sha256 was"):
            run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))


def test_servers_share_the_work_and_each_response_keeps_its_seed(folder: Path) -> None:
    with FakeSGLang(plan(folder)) as one, FakeSGLang(plan(folder)) as other:
        run_eval(folder, folder / "two", sums(folder), urls=(one.url, other.url))
    assert one.requests
    assert other.requests
    with FakeSGLang(plan(folder)) as alone:
        run_eval(folder, folder / "one", sums(folder), urls=(alone.url,))
    assert records(folder / "one") == records(folder / "two")
    seeds = [body["sampling_params"]["sampling_seed"] for body in alone.requests]
    assert len(set(seeds)) == ITEMS * SAMPLES


def test_each_set_has_its_own_verifier_temperature_and_samples(folder: Path) -> None:
    sets = {
        **sums(folder, temperature=0.0, samples_per_prompt=1, max_prompts=2),
        "numbers": {"path": str(folder / "sums.jsonl"), "verifier": "tests.support.grading.verifiers:source_only"},
    }
    with FakeSGLang(plan(folder)) as fake:
        summary = run_eval(folder, folder / "out", sets, urls=(fake.url,))
    temperatures = Counter(body["sampling_params"]["temperature"] for body in fake.requests)
    assert temperatures == {0.0: 2, 0.6: ITEMS * SAMPLES}
    assert summary["sets"]["sums"]["maj@k"] == {"1": summary["sets"]["sums"]["avg"]}
    assert summary["sets"]["numbers"]["maj@k"] == {}, "a verifier of the user's own states no answers"


def test_a_truncated_response_is_wrong_and_counted(folder: Path) -> None:
    with FakeSGLang(plan(folder)) as fake:
        summary = run_eval(folder, folder / "out", sums(folder), urls=(fake.url,), rollout={"max_new_tokens": 5})
    figures = summary["sets"]["sums"]
    assert (figures["avg"], figures["truncated"], figures["mean_tokens"]) == (0.0, ITEMS * SAMPLES, 5.0)
    assert {record.answer for record in records(folder / "out").values()} == {None}


def test_prompts_that_are_too_long_are_lost_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_sums(folder / "sums.jsonl", 40)  # "10+70=" and later have six characters
    with FakeSGLang(plan(folder)) as fake:
        data = {"max_prompt_tokens": 5}
        summary = run_eval(folder, folder / "out", sums(folder), urls=(fake.url,), data=data)
    figures = summary["sets"]["sums"]
    asked = len({tuple(body["input_ids"]) for body in fake.requests})
    assert (figures["samples"], figures["lost"]) == (3 * asked, 3 * (40 - asked))
    assert 0 < asked < 40
    assert f"{3 * (40 - asked)} responses never came" in caplog.text


def test_a_refused_request_is_lost_and_the_rest_goes_on(folder: Path) -> None:
    reply = sglang(often_right, folder / "model")
    with FakeSGLang(lambda index, body: "400" if index == 0 else reply) as fake:
        summary = run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))
    assert (summary["sets"]["sums"]["samples"], summary["sets"]["sums"]["lost"]) == (ITEMS * SAMPLES - 1, 1)
    with FakeSGLang(plan(folder)) as fake:
        summary = run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))
    assert (len(fake.requests), summary["sets"]["sums"]["lost"]) == (1, 0), "a lost response is asked for again"


def test_an_endpoint_that_fails_on_and_on_is_given_up(folder: Path) -> None:
    reply = sglang(often_right, folder / "model")
    garbage = lambda body: web.Response(text="<html>login</html>")  # noqa: E731
    with (
        FakeSGLang(lambda index, body: reply if index < 1 else garbage) as fake,
        pytest.raises(RunEnded, match=r"(?s)16 responses in a row.*no JSON.*login.*1 of 18 responses are recorded"),
    ):
        run_eval(folder, folder / "out", sums(folder), urls=(fake.url,), rollout={"max_in_flight": 1})
    assert len(records(folder / "out")) == 1


CUT = [
    ("half an answer", lambda body: web.Response(body=b'{"choices": [{"mess', content_type="application/json")),
    ("a closed connection", "reset"),
    ("an error", "500"),
    ("a page", lambda body: web.Response(text="<html>login</html>")),
]


@pytest.mark.parametrize("reply", [reply for _, reply in CUT], ids=[name for name, _ in CUT])
def test_an_endpoint_whose_answers_are_cut_or_no_answers_costs_these_alone(folder: Path, reply: Any) -> None:
    good = lambda body: chat(often_right(body["messages"][0]["content"], body["seed"]))  # noqa: E731
    arguments: Any = {"model": "m", "api": "chat", "rollout": {"max_in_flight": 1, "retries": 0}}
    with FakeSGLang(lambda index, body: reply if index in (2, 3) else good) as fake:
        summary = run_eval(folder, folder / "out", sums(folder), urls=(fake.url,), **arguments)
    assert (summary["sets"]["sums"]["samples"], summary["sets"]["sums"]["lost"]) == (ITEMS * SAMPLES - 2, 2)
    with (
        FakeSGLang(lambda index, body: reply) as fake,
        pytest.raises(RunEnded, match=r"(?s).+\n0 of 90 responses are recorded in .*: start the same command again"),
    ):
        run_eval(folder, folder / "other", sums(folder, samples_per_prompt=15), urls=(fake.url,), **arguments)


def test_an_endpoint_that_is_down_is_named(folder: Path) -> None:
    with FakeSGLang() as fake:
        url = fake.url
    for api in ("sglang", "chat"):
        with pytest.raises(ValueError, match=rf"{url}\S*: nothing answers there"):
            run_eval(folder, folder / api, sums(folder), urls=(url,), api=api)


def test_a_set_without_answers_is_named_before_anything_is_asked(folder: Path) -> None:
    (folder / "sums.jsonl").write_text('{"prompt": "1+1=", "id": "a"}\n')
    with FakeSGLang(plan(folder)) as fake, pytest.raises(ValueError, match=r"(?s)eval.sets.sums: .*answer: is missing"):
        run_eval(folder, folder / "out", sums(folder), urls=(fake.url,))
    assert not fake.requests


def test_two_sets_of_one_name_are_refused(folder: Path) -> None:
    file = folder / "sets.yaml"
    file.write_text("eval:\n  sets:\n    a: {path: x.jsonl}\n    a: {path: y.jsonl}\n")
    with pytest.raises(ValueError, match=r"sets.yaml.*'a' stands twice"):
        load_tree(EvalCommandConfig, file)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1", r"eval.sets=\{\}: name at least one set"),
        ("{data: {prompts: [a.jsonl]}, eval: {sets: {a: {path: a.jsonl}}}}", "data.prompts=.*: does nothing here"),
        ("{run: {dir: x}}", "run: unknown key"),
        ("{seed: -1, eval: {sets: {a: {path: a.jsonl}}}}", "seed=-1: must be in"),
    ],
)
def test_a_sets_file_that_cannot_be_used_is_named(folder: Path, text: str, problem: str) -> None:
    (folder / "sets.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"sets.yaml: {problem}"):
        load_tree(EvalCommandConfig, folder / "sets.yaml")


def test_a_folder_that_is_no_model_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no config.json there"):
        run_eval(folder, folder / "out", sums(folder), model=str(folder / "nowhere"), urls=("http://127.0.0.1:1",))


def test_a_chat_endpoint_gets_messages_and_renders_them(folder: Path) -> None:
    def reply(body: dict[str, Any]) -> web.Response:
        (message,) = body["messages"]
        return chat(often_right(message["content"], body["seed"]))

    with FakeSGLang(lambda index, body: reply) as fake:
        summary = run_eval(folder, folder / "out", sums(folder), model="gpt", urls=(fake.url + "/v1",), api="chat")
    body = fake.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["n"]) == ("gpt", 0.6, 64, 1)
    assert summary["sets"]["sums"]["samples"] == ITEMS * SAMPLES
    with FakeSGLang(plan(folder)) as native:
        expected = run_eval(folder, folder / "native", sums(folder), urls=(native.url,))
    assert summary["sets"]["sums"]["avg"] == expected["sets"]["sums"]["avg"], "prompts and seeds are the same"


def test_thinking_that_a_server_parts_from_a_response_is_kept(folder: Path) -> None:
    replies = [
        chat("\\boxed{0}", reasoning_content="zero"),
        chat(None, "length", reasoning_content="so \\boxed{0}"),
    ]
    with FakeSGLang(lambda index, body: lambda _: replies[index]) as fake:
        write_sums(folder / "sums.jsonl", 1)
        keys = {"samples_per_prompt": 2}
        run_eval(folder, folder / "out", sums(folder, **keys), model="m", urls=(fake.url,), api="chat",
                 rollout={"max_in_flight": 1}, grading={"fail_truncated": False})  # fmt: skip
    found = records(folder / "out")
    assert found["sum-0", 0].response == "<think>\nzero\n</think>\n\\boxed{0}"
    assert found["sum-0", 0].correct is True
    assert found["sum-0", 1].response == "<think>\nso \\boxed{0}"
    assert (found["sum-0", 1].correct, found["sum-0", 1].truncated) == (False, True)


def test_an_answer_that_is_no_whole_response_is_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    usage, message = {"completion_tokens": 1}, {"content": "x"}
    answers: list[Any] = [
        {"choices": []},
        {"choices": [{"message": message, "finish_reason": "stop"}]},
        {"choices": [{"message": message, "finish_reason": "content_filter"}], "usage": usage},
        {"choices": [{"message": "x", "finish_reason": "stop"}], "usage": usage},
        ["x"],
    ]
    write_sums(folder / "sums.jsonl", len(answers))
    with FakeSGLang(lambda index, body: lambda _: web.json_response(answers[index])) as fake:
        sets = sums(folder, samples_per_prompt=1)
        summary = run_eval(folder, folder / "out", sets, model="m", urls=(fake.url,), api="chat")
    figures = summary["sets"]["sums"]
    assert (figures["avg"], figures["samples"], figures["lost"]) == (None, 0, len(answers))
    assert "lost response 0 to sum-0" in caplog.text


def test_a_majority_counts_the_file_s_options_whatever_their_order(folder: Path) -> None:
    """The model always chooses neon: that is right for one prompt and wrong for another."""
    question = "Which is a {}?\nA) iron\nB) neon\nC) salt\nD) wood\n"
    rows = [
        {"id": "gas", "prompt": question.format("gas"), "answer": "B"},
        {"id": "metal", "prompt": question.format("metal"), "answer": "A"},
    ]
    path = folder / "choice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def chooses_neon(prompt: str, seed: int) -> str:
        (label,) = [line[0] for line in prompt.splitlines() if line.endswith(") neon")]
        return f"The answer is ({label})."

    reply = sglang(chooses_neon, folder / "model")
    with FakeSGLang(lambda index, body: reply) as fake:
        sets = {"choice": {"path": str(path), "verifier": "choice", "shuffle_options": True, "samples_per_prompt": 8}}
        summary = run_eval(folder, folder / "out", sets, urls=(fake.url,))
    found = records(folder / "out", "choice")
    assert {record.answer for record in found.values()} == {"B"}
    assert {record.correct for record in found.values() if record.item == "gas"} == {True}
    assert {record.correct for record in found.values() if record.item == "metal"} == {False}
    assert len({record.response for record in found.values()}) > 1, "the letter of neon differs between responses"
    assert summary["sets"]["choice"]["maj@k"] == {"1": 0.5, "2": 0.5, "4": 0.5, "8": 0.5}


def test_what_a_set_asks_for_and_cannot_have_is_named_before_anything_is_asked(folder: Path) -> None:
    with FakeSGLang(plan(folder)) as fake:
        with pytest.raises(ValueError, match=r"eval.sets.sums.verifier='no_such_module:f': "):
            run_eval(folder, folder / "out", sums(folder, verifier="no_such_module:f"), urls=(fake.url,))
        with pytest.raises(ValueError, match=r"eval.sets.sums: \S*sums.jsonl: prompt sum-0: .*no options found"):
            run_eval(folder, folder / "out", sums(folder, shuffle_options=True), urls=(fake.url,))
    assert not fake.requests


def test_a_completions_endpoint_gets_token_ids_where_there_is_a_tokenizer_and_else_text(folder: Path) -> None:
    def reply(body: dict[str, Any]) -> web.Response:
        choice = {"text": "\\boxed{0}", "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 3}})

    for name, tokenizer in (("ids", folder / "model"), ("text", None)):
        with FakeSGLang(lambda index, body: reply) as fake:
            run_eval(folder, folder / name, sums(folder), model="m", urls=(fake.url,), api="completions",
                     tokenizer=tokenizer)  # fmt: skip
        prompts = {json.dumps(body["prompt"]) for body in fake.requests}
        assert ('"1+7="' in prompts) == (tokenizer is None)
        assert all(isinstance(json.loads(prompt), str if tokenizer is None else list) for prompt in prompts)
