"""A teacher's log-probs of rollouts: sound answers are accepted, and every kind of bad answer is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.teacher.check import name_of_model, require_same_tokenizer
from megatron_dypo.rollout.teacher.client import NoLogprobsError, TeacherClient
from megatron_dypo.rollout.teacher.logprobs import Answered, teacher_logprobs
from megatron_dypo.types import Sample, SampleKind, Treatment
from tests.support.fake_sglang import FakeSGLang, Reply, wait_until
from tests.support.fake_teacher import Codes, answer, logp_of, openai_payload, sglang_payload
from tests.support.rollout.clients import closed_url

PROMPT, RESPONSE = np.array([5, 6, 7], np.int32), np.array([8, 6, 2], np.int32)
EXPECTED = np.array([logp_of(8), logp_of(6), logp_of(2)], np.float32)
APIS = ("sglang", "openai")


def config(url: str, api: str = "sglang", **fields: Any) -> TeacherServersConfig:
    model = "teacher" if api == "openai" else None
    defaults: dict[str, Any] = {"urls": (url,), "retries": 1, "request_deadline_s": 20.0}
    return TeacherServersConfig(**{**defaults, "api": api, "model": model, **fields})


def ask(cfg: TeacherServersConfig, api_key: str | None = None) -> np.ndarray:
    async def one() -> np.ndarray:
        async with TeacherClient(cfg, api_key, vocab_size=128, backoff_s=0.01) as client:
            return await client.logprobs(PROMPT, RESPONSE)

    return asyncio.run(one())


def samples(count: int) -> list[Sample]:
    return [
        Sample(
            order=order,
            member=0,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=np.concatenate([PROMPT, RESPONSE, [order]]).astype(np.int32),
            num_prompt_tokens=len(PROMPT),
            policy_version=0,
        )
        for order in range(count)
    ]


def last_logps(found: Sequence[Answered]) -> list[np.float32]:
    return [row[-1] for row in found if isinstance(row, np.ndarray)]


@pytest.mark.parametrize("api", APIS)
def test_log_probs_are_those_of_the_response_in_its_order(api: str) -> None:
    with FakeSGLang(lambda _, body: answer(body)) as fake:
        assert np.array_equal(ask(config(fake.url, api), "secret"), EXPECTED)
    (body,) = fake.requests
    assert fake.authorization == ["Bearer secret"]
    assert body.get("input_ids", body.get("prompt")) == [5, 6, 7, 8, 6, 2]
    assert body.get("sampling_params", body)["temperature"] == 1.0


@pytest.mark.parametrize("names_ids", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_an_openai_server_may_leave_out_ids_and_the_sampled_token(names_ids: bool, sampled: bool) -> None:
    def plan(_: int, body: dict[str, Any]) -> Reply:
        return lambda _: web.json_response(openai_payload(body, names_ids=names_ids, samples=sampled))

    with FakeSGLang(plan) as fake:
        assert np.array_equal(ask(config(fake.url, "openai")), EXPECTED)


def changed(change: Callable[[list[Any], dict[str, Any]], None]) -> Callable[[dict[str, Any]], Any]:
    """Return SGLang's answer with its rows changed."""

    def payload(body: dict[str, Any]) -> Any:
        found = sglang_payload(body)
        change(found["meta_info"]["input_token_logprobs"], found["meta_info"])
        return found

    return payload


def openai_changed(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], Any]:
    def payload(body: dict[str, Any]) -> Any:
        found = openai_payload(body)
        change(found["choices"][0]["logprobs"])
        return found

    return payload


BAD: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "a list": ("sglang", lambda _: [], "input_token_logprobs"),
    "a number": ("sglang", lambda _: 3, "input_token_logprobs"),
    "no meta": ("sglang", lambda _: {"text": ""}, "input_token_logprobs"),
    "no rows": ("sglang", changed(lambda _, meta: meta.update(input_token_logprobs=None)), "must be a list of rows"),
    "words for rows": ("sglang", changed(lambda rows, _: rows.append("x")), "must be a list of rows"),
    "short": ("sglang", changed(lambda rows, _: rows.pop()), "log-probs of 3 tokens for 4"),
    "long": ("sglang", changed(lambda rows, _: rows.append([-1.0, 2, None])), "log-probs of 5 tokens for 4"),
    "other tokens": ("sglang", changed(lambda rows, _: rows[2].__setitem__(1, 11)), "token 11 at place 1"),
    "true for an id": ("sglang", changed(lambda rows, _: rows[2].__setitem__(1, True)), "token True at place 1"),
    "null": ("sglang", changed(lambda rows, _: rows[1].__setitem__(0, None)), "log-prob None at place 0"),
    "NaN": ("sglang", changed(lambda rows, _: rows[3].__setitem__(0, float("nan"))), "log-prob nan at place 2"),
    "infinite": ("sglang", changed(lambda rows, _: rows[3].__setitem__(0, float("-inf"))), "log-prob -inf"),
    "positive": ("sglang", changed(lambda rows, _: rows[3].__setitem__(0, 0.5)), "log-prob 0.5"),
    "no choices": ("openai", lambda _: {"choices": []}, "must be one"),
    "no log-probs": ("openai", lambda _: {"choices": [{"text": "x", "logprobs": None}]}, "must be one"),
    "no echo": ("openai", openai_changed(lambda p: p.update(tokens=["a"], token_logprobs=[-1.0])), "of 1 tokens for 7"),
    "lists that differ": ("openai", openai_changed(lambda p: p["tokens"].pop()), "must be one"),
    "other ids": ("openai", openai_changed(lambda p: p["tokens"].__setitem__(4, "token_id:11")), "token 11 at place 1"),
    "a word": ("openai", openai_changed(lambda p: p["tokens"].__setitem__(4, "word")), "token 'word' at place 1"),
    "a NaN": ("openai", openai_changed(lambda p: p["token_logprobs"].__setitem__(5, float("nan"))), "log-prob nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_no_log_prob_and_its_reason_is_said(name: str) -> None:
    api, payload_of, words = BAD[name]

    def plan(_: int, body: dict[str, Any]) -> Reply:
        return lambda _: web.Response(body=json.dumps(payload_of(body)).encode())

    with FakeSGLang(plan) as fake, pytest.raises(NoLogprobsError, match="2 attempts failed") as caught:
        ask(config(fake.url, api))
    assert words in str(caught.value)
    assert fake.url in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("500", "2 attempts failed.*HTTP 500: out of luck"),
        ("400", "HTTP 400.*the prompt is too long"),
        ("reset", "2 attempts failed"),
        (lambda _: web.Response(text="<html>"), "no JSON"),
        (lambda _: web.Response(text="[" + " " * 2_000_000), "an answer of more than"),
    ],
)
def test_a_server_that_does_not_answer_gives_no_log_probs(reply: Reply, words: str) -> None:
    with FakeSGLang(lambda *_: reply) as fake, pytest.raises(NoLogprobsError, match=words):
        ask(config(fake.url))


def test_a_slow_server_costs_the_deadline_and_no_more() -> None:
    with FakeSGLang(lambda *_: "hang") as fake, pytest.raises(NoLogprobsError, match="no teacher's log-probs after"):
        ask(config(fake.url, request_deadline_s=0.3))


@pytest.mark.parametrize(("last", "is_taken"), [(8, True), (9, False)])
def test_sglang_may_write_0_for_the_last_token_of_the_vocabulary_alone(last: int, is_taken: bool) -> None:
    def plan(_: int, body: dict[str, Any]) -> Reply:
        found = changed(lambda rows, _: rows[1].__setitem__(1, 0))(body)
        return lambda _: web.json_response(found)

    async def one() -> np.ndarray:
        async with TeacherClient(config(fake.url, retries=0), None, vocab_size=last + 1) as client:
            return await client.logprobs(PROMPT, RESPONSE)

    with FakeSGLang(plan) as fake:
        if is_taken:
            assert np.array_equal(asyncio.run(one()), EXPECTED)
        else:
            with pytest.raises(NoLogprobsError, match="token 0 at place 0"):
                asyncio.run(one())


def test_a_server_that_is_down_is_asked_again_and_others_take_over() -> None:
    with pytest.raises(NoLogprobsError, match="2 attempts failed"):
        ask(config(closed_url()))
    with FakeSGLang(lambda _, body: answer(body)) as fake:
        cfg = config(fake.url, urls=(closed_url(), fake.url), retries=3)
        found = teacher_logprobs(samples(6), TeacherClient(cfg, None, vocab_size=128, backoff_s=0.01), progress=False)
    assert [row[-1] for row in found if isinstance(row, np.ndarray)] == [
        np.float32(logp_of(order)) for order in range(6)
    ]


def test_a_bad_answer_is_asked_for_again() -> None:
    with FakeSGLang(lambda index, body: "500" if index == 0 else answer(body)) as fake:
        assert np.array_equal(ask(config(fake.url)), EXPECTED)
    assert len(fake.requests) == 2


def test_requests_are_spread_over_servers_and_bounded() -> None:
    both_asked = threading.Barrier(2, timeout=20.0)  # then neither server is ahead, and none is less loaded

    def plan(_: int, body: dict[str, Any]) -> Reply:
        both_asked.wait()
        return answer(body)

    with FakeSGLang(plan) as one, FakeSGLang(plan) as other:
        cfg = config(one.url, urls=(one.url, other.url), max_in_flight=2)
        found = teacher_logprobs(samples(12), TeacherClient(cfg, None, vocab_size=128), progress=False)
    assert [row[-1] for row in found if isinstance(row, np.ndarray)] == [
        np.float32(logp_of(order)) for order in range(12)
    ]
    assert len(one.requests) == len(other.requests) == 6
    assert max(one.max_open, other.max_open) <= 2


def test_a_stop_leaves_what_is_not_answered_without_log_probs() -> None:
    stop = StopFlag()

    def plan(_: int, body: dict[str, Any]) -> Reply:
        if body["input_ids"][-1] != 1:
            return answer(body)
        stop.set()
        return "hang"

    with FakeSGLang(plan) as fake:
        found = teacher_logprobs(
            samples(2), TeacherClient(config(fake.url), None, vocab_size=128), stop=stop, progress=False
        )
        wait_until(lambda: fake.cancelled == 1, "the open request is aborted")
    assert found[1] is None


@pytest.fixture
def teacher() -> Iterator[Callable[[Codes], str]]:
    fakes: list[FakeSGLang] = []

    def start(tokenizer: Codes) -> str:
        fakes.append(FakeSGLang(lambda _, body: answer(body, tokenizer)).__enter__())
        return fakes[-1].url

    yield start
    for fake in fakes:
        fake.__exit__()


@pytest.mark.parametrize("api", APIS)
def test_a_teacher_with_the_same_tokenizer_is_taken(api: str, teacher: Callable[[Codes], str]) -> None:
    require_same_tokenizer(config(teacher(Codes()), api), "key", Codes(), policy="models/policy")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Codes(97), "has ids"),
        (type("Renamed", (Codes,), {"show": lambda *_: "?"})(), "the policy's last token, 127, is"),
    ],
)
def test_a_teacher_with_another_tokenizer_is_refused_at_the_start(
    other: Codes, words: str, teacher: Callable[[Codes], str]
) -> None:
    url = teacher(other)
    with pytest.raises(ValueError, match="must have the policy's tokenizer") as caught:
        require_same_tokenizer(config(url), None, Codes(), policy="models/policy")
    for part in (words, url, "that of model.hf_path=models/policy"):
        assert part in str(caught.value)


def test_a_teachers_model_has_the_name_that_the_config_or_the_servers_tell_without_their_folders() -> None:
    assert name_of_model(config(closed_url(), "openai", model="/models/big"), None) == "big"
    assert name_of_model(config(closed_url()), None) is None
    with FakeSGLang(models=("/a/big",)) as first, FakeSGLang(models=("/b/big", "other")) as second:
        assert name_of_model(config("", urls=(first.url,)), "key") == "big"
        assert name_of_model(config("", urls=(first.url, second.url)), "key") == "big, other"


def test_a_teacher_that_does_not_answer_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="nothing answers"):
        require_same_tokenizer(config(closed_url()), None, Codes(), policy="")
    with FakeSGLang(lambda *_: "500") as fake, pytest.raises(ValueError, match="HTTP 500"):
        require_same_tokenizer(config(fake.url), None, Codes(), policy="")


def test_a_teacher_that_refuses_the_key_is_named_with_the_variable_of_the_key() -> None:
    def refuse(_: int, body: dict[str, Any]) -> Reply:
        return lambda _: web.json_response({"error": "Unauthorized"}, status=401)

    with (
        FakeSGLang(refuse) as fake,
        pytest.raises(ValueError, match=r"/tokenize refuses the API key: set DYPO_TEACHER_API_KEY") as caught,
    ):
        require_same_tokenizer(config(fake.url), "secret", Codes(), policy="")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"urls": ("localhost:1",)}, "urls='localhost:1'"),
        ({"api": "openai"}, "model=None: is needed by api: openai"),
        ({"model": "x"}, "model='x': is needed by api: openai, and by it alone"),
        ({"max_in_flight": 0}, "max_in_flight=0"),
        ({"retries": -1}, "retries=-1"),
        ({"request_deadline_s": 0.0}, "request_deadline_s=0.0"),
        ({"api_key_env": "sk-secret"}, "api_key_env: must be the name"),
    ],
)
def test_a_config_that_breaks_a_rule_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"=|api_key_env") as caught:
        TeacherServersConfig(**fields)
    assert message in str(caught.value)
    assert "sk-secret" not in str(caught.value)
