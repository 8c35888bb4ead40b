"""Unusable answers, and failures of the client itself: the cost and the message of each."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.rollout import ask as ask_module
from megatron_dypo.rollout.ask import AttemptError, LostServerError, OwnLackError, shown
from megatron_dypo.rollout.attempts import GroupDroppedError
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.descriptors import lacks_descriptors, raise_descriptor_limit
from megatron_dypo.types import DropReason
from tests.support.fake_sglang import FakeSGLang, Reply, sample, wait_until
from tests.support.rollout.clients import closed_url, make_client, make_prompts

HTML = "<html>\n<body>502 Bad Gateway</body></html>"


def text(body: str | bytes, status: int = 200, **headers: str) -> Callable[[dict[str, Any]], web.Response]:
    data = body.encode() if isinstance(body, str) else body
    return lambda request: web.Response(body=data, status=status, headers=headers)


def with_meta(**meta: Any) -> Callable[[dict[str, Any]], web.Response]:
    """Return an answer that is sound except for these fields."""
    return lambda body: web.json_response(
        [sample(body, index, **meta) for index in range(body["sampling_params"]["n"])]
    )


FAILURES: dict[str, tuple[Reply, str]] = {
    "HTML": (text(HTML), r"HTTP 200, and no JSON .*: <html> <body>502 Bad Gateway</body></html>"),
    "empty": (text(""), "HTTP 200, and no JSON .*: an empty body"),
    "cut JSON": (text('[{"output_ids": [1,'), r"no JSON .*: \[\{\"output_ids\": \[1,"),
    "bytes": (text(b"\xff\xfe\x00"), "no JSON"),
    "huge integer": (text("[" + "9" * 5000 + "]"), "no JSON"),
    "deep": (text("[" * 100_000), "no JSON"),
    "an object": (text('{"error": {"message": "busy"}}'), r"1 of 2 responses; .*HTTP 200: .*busy"),
    "no log-probs": (with_meta(output_token_logprobs=None), "0 log-probs for 3 tokens"),
    "null log-prob": (with_meta(output_token_logprobs=[[None, 1, None]] * 3), "log-probs for 3 tokens, or of other"),
    "401": (text("who?", 401), "HTTP 401: who?"),
    "403": (text("no", 403), "HTTP 403: no"),
    "404": (text("404: Not Found", 404), "HTTP 404: 404: Not Found"),
    "429": (text("later", 429), "HTTP 429: later"),
    "503": (text("drained", 503), "HTTP 503: drained"),
    "500 of megabytes": (text("x" * 3_000_000, 500), "HTTP 500: x{200}$"),
    "redirect": (text("", 302, Location="http://127.0.0.1:9/"), "HTTP 302: an empty body"),
    "moved": (text("", 308, Location="http://127.0.0.1:9/"), "HTTP 308"),
    "gzip": (text(b"\x1f\x8b\x08\x00", 200, **{"Content-Encoding": "gzip"}), "no JSON"),
    "endless": (text("[" + " " * 2_000_000), r"an answer of more than \d+ bytes, cut off: \["),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_answer_that_is_none_is_retried_and_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    reply, words = FAILURES[name]
    with FakeSGLang(lambda index, body: reply if index == 0 else "ok") as fake:
        groups, stats = collect(make_prompts(1), make_client([fake.url]), group_size=2, progress=False)
    assert (len(groups), stats.retries, len(stats.dropped), len(fake.requests)) == (1, 1, 0, 2)
    (record,) = caplog.records
    message = record.getMessage()
    assert fake.url in message
    assert re.search(words, message), message
    assert len(message) < 700


def dropped(url: str, **fields: Any) -> GroupDroppedError:
    """Return the error for a prompt that the server never answers well."""

    async def one(client: SGLangClient) -> GroupDroppedError:
        async with client:
            with pytest.raises(GroupDroppedError) as caught:
                await client.generate(make_prompts(1)[0].tokens, client.sampling(2))
            return caught.value

    return asyncio.run(one(make_client([url], **fields)))


@pytest.mark.parametrize("name", ["HTML", "404", "no log-probs"])
def test_a_group_that_fails_to_the_end_is_incomplete_with_its_last_reason(name: str) -> None:
    reply, _ = FAILURES[name]
    with FakeSGLang(lambda index, body: reply) as fake:
        error = dropped(fake.url, retries=1)
    assert error.reason is DropReason.INCOMPLETE
    assert str(error).startswith("2 attempts failed, the last: ")
    assert fake.url in str(error)


@pytest.mark.parametrize("name", ["429", "503"])
def test_servers_that_take_no_request_for_a_while_cost_no_attempt(name: str) -> None:
    reply, _ = FAILURES[name]
    with FakeSGLang(lambda index, body: reply if index < 9 else "ok") as fake:
        client = make_client([fake.url], retries=0)
        groups, stats = collect(make_prompts(3), client, group_size=2, progress=False)
    assert (len(groups), len(stats.dropped)) == (3, 0)
    assert len(fake.requests) == 12


def test_a_server_that_takes_no_request_to_the_deadline_says_so() -> None:
    with FakeSGLang(lambda index, body: text("drained", 503)) as fake:
        error = dropped(fake.url, request_deadline_s=0.5, retries=0)
    assert error.reason is DropReason.INCOMPLETE
    assert str(error).startswith("no complete group after request_deadline_s=0.5; last failure: ")
    assert "HTTP 503: drained" in str(error)


def test_a_refused_prompt_says_that_it_is() -> None:
    with FakeSGLang(lambda index, body: "400") as fake:
        error = dropped(fake.url)
    assert error.reason is DropReason.REFUSED
    assert "HTTP 400" in str(error)
    assert "the prompt is too long" in str(error)


def test_a_group_at_its_deadline_says_what_failed_last() -> None:
    def plan(index: int, body: dict[str, Any]) -> Reply:
        return "500" if index == 0 else "hang"

    with FakeSGLang(plan) as fake:
        error = dropped(fake.url, request_deadline_s=0.5)
    assert error.reason is DropReason.INCOMPLETE
    assert "request_deadline_s=0.5" in str(error)
    assert "HTTP 500: out of luck" in str(error)


@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_key_is_in_no_message(status: int, caplog: pytest.LogCaptureFixture) -> None:
    key = "0123456789abcdef" * 8
    reply = text("x" * 100 + f"you sent Bearer {key}", status)
    with FakeSGLang(lambda index, body: reply) as fake:
        client = make_client([fake.url], retries=1, api_key=key)
        collect(make_prompts(1), client, group_size=2, progress=False)
    assert "you sent Bearer ***" in caplog.text
    assert key[:8] not in caplog.text


def _always(answer: Reply, index: int, body: dict[str, Any]) -> Reply:
    return answer


def test_the_key_is_in_no_message_about_a_field(caplog: pytest.LogCaptureFixture) -> None:
    fields: list[dict[str, Any]] = [
        {"finish_reason": {"type": "abort", "message": "s3cret"}},
        {"weight_version": "s3cret"},
    ]
    for meta in fields:
        answer = with_meta(**meta)
        with FakeSGLang(functools.partial(_always, answer)) as fake:
            client = make_client([fake.url], retries=1, api_key="s3cret")
            collect(make_prompts(1), client, group_size=2, progress=False)
    assert "'message': '***'" in caplog.text
    assert "weights of version ***" in caplog.text
    assert "s3cret" not in caplog.text


def test_a_body_is_shown_on_one_line_of_200_characters() -> None:
    assert shown(b"a\n\x1b[31m b\t" + b"c" * 300, None) == "a ?[31m b " + "c" * 190


def test_an_answer_may_be_as_long_as_its_longest_responses() -> None:
    """Every token has a log-prob of 20 digits and a text that is escaped."""

    def long_answer(body: dict[str, Any]) -> web.Response:
        n, length = body["sampling_params"]["n"], body["sampling_params"]["max_new_tokens"]
        rows = [[-12.345678901234567890, 151_000, "\U0001f600" * 8]] * length
        meta = {"finish_reason": {"type": "length", "length": length}, "output_token_logprobs": rows}
        one = {"output_ids": [151_000] * length, "meta_info": {"weight_version": "default", **meta}}
        return web.Response(text=json.dumps([one] * n))

    with FakeSGLang(lambda index, body: long_answer) as fake:
        client = make_client([fake.url], max_new_tokens=4000)
        assert len(collect(make_prompts(1), client, group_size=4, progress=False)[0]) == 1


def test_an_endless_answer_is_cut_off_long_before_it_ends() -> None:
    sent = 0

    class Endless(web.StreamResponse):
        async def prepare(self, request: web.BaseRequest) -> Any:
            nonlocal sent
            writer = await super().prepare(request)
            while sent < 400 * 2**20:
                await self.write(b" " * 2**20)
                sent += 2**20
            return writer

    with FakeSGLang(lambda index, body: (lambda request: Endless()) if index == 0 else "ok") as fake:
        groups, stats = collect(make_prompts(1), make_client([fake.url]), group_size=2, progress=False)
    assert (len(groups), stats.retries) == (1, 1)
    assert sent < 40 * 2**20


def test_tokens_that_are_thrown_away_are_counted_since_the_context_was_entered() -> None:
    replies: list[Reply] = ["aborted", with_meta(output_token_logprobs=None), text(HTML), "ok"]
    with FakeSGLang(lambda index, body: replies[index % 4]) as fake:
        client = make_client([fake.url])
        for _ in range(2):
            assert len(collect(make_prompts(1), client, group_size=4, progress=False)[0]) == 1
            assert (client.dropped_rollouts, client.dropped_tokens, client.dropped_longest) == (8, 24, 3)
            assert client.retries == 3


def test_a_token_outside_the_vocabulary_costs_the_client_an_attempt() -> None:
    """The prompt's last token, 100, comes back as the first of the response."""
    with FakeSGLang() as fake:
        client = make_client([fake.url], vocab_size=100, retries=0)
        groups, stats = collect(make_prompts(1), client, group_size=2, progress=False)
        assert (groups, len(stats.dropped), client.dropped_tokens) == ([], 1, 6)
        client = make_client([fake.url], vocab_size=101, retries=0)
        assert len(collect(make_prompts(1), client, group_size=2, progress=False)[0]) == 1


def test_a_server_without_the_encryption_that_its_url_promises_costs_attempts() -> None:
    with FakeSGLang() as fake:
        error = dropped(fake.url.replace("http:", "https:"), retries=1)
    assert error.reason is DropReason.INCOMPLETE
    assert "2 attempts failed" in str(error)


def test_a_server_that_gives_nonsense_at_once_does_not_get_all_requests() -> None:
    nonsense = with_meta(output_token_logprobs=[[None, 0, None]] * 3)
    with FakeSGLang(lambda index, body: nonsense) as bad, FakeSGLang() as good:
        client = make_client([bad.url, good.url], retries=3, max_in_flight=2)
        groups, _ = collect(make_prompts(30), client, group_size=2, progress=False)
    assert len(groups) == 30
    assert len(bad.requests) < 25


@contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """Set a soft limit that leaves about that many files to open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probes = [socket.socket() for _ in range(free)]
    highest = max(probe.fileno() for probe in probes)
    for probe in probes:
        probe.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_our_own_lack_of_descriptors_waits_and_blames_no_server(tmp_path: Path) -> None:
    """A process that may open 60 files asks for 256 groups at once."""
    program = tmp_path / "client.py"
    program.write_text(
        "import resource, sys\n"
        "from megatron_dypo.rollout.collect import collect\n"
        "from tests.support.rollout.clients import make_client, make_prompts\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "client = make_client([sys.argv[1]], max_in_flight=256, retries=0)\n"
        "groups, stats = collect(make_prompts(256), client, group_size=2, progress=False)\n"
        "print(len(groups), len(stats.unserved), len(stats.dropped), stats.retries)\n"
    )

    said, lack = tmp_path / "stderr", "cannot open another connection"
    with (
        FakeSGLang(lambda index, body: "hang") as fake,
        said.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, program, fake.url],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as client,
    ):
        try:
            wait_until(lambda: lack in said.read_text(), "the client has no descriptor left", 60.0)
            fake.release()
            stdout, _ = client.communicate(timeout=60)
        finally:
            client.kill()
    assert client.returncode == 0, said.read_text()
    assert stdout == "256 0 0 0\n"
    assert fake.max_open < 60
    assert "no more requests" not in said.read_text()
    assert said.read_text().count(lack) == 1


def test_without_any_descriptor_a_group_ends_at_its_deadline_with_the_reason() -> None:
    async def one() -> None:
        async with make_client(["http://127.0.0.1:9"], request_deadline_s=0.5) as client:
            with few_descriptors(1), socket.socket():
                assert lacks_descriptors()
                with pytest.raises(GroupDroppedError, match="Too many open files") as caught:
                    await client.generate(make_prompts(1)[0].tokens, client.sampling(2))
        assert caught.value.reason is DropReason.INCOMPLETE

    asyncio.run(one())


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        assert raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not lacks_descriptors()


def connector_error(number: int | None, words: str = "Connect call failed") -> aiohttp.ClientConnectorError:
    error = OSError(number, words) if number is not None else OSError(words)
    key = aiohttp.client_reqrep.ConnectionKey("h", 1, False, True, None, None, None)
    return aiohttp.ClientConnectorError(key, error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (connector_error(errno.ECONNREFUSED), LostServerError),
        (connector_error(errno.EHOSTUNREACH), LostServerError),
        (connector_error(None, "Multiple exceptions: [Errno 111] refused, [Errno 99] ::1"), LostServerError),
        (connector_error(errno.EMFILE), OwnLackError),
        (connector_error(errno.ENFILE), OwnLackError),
        (connector_error(errno.EADDRNOTAVAIL), OwnLackError),
        (connector_error(errno.ENOBUFS), OwnLackError),
        (connector_error(None, "Multiple exceptions: [Errno 24] one, [Errno 111] other"), OwnLackError),
        (connector_error(errno.ENETUNREACH), AttemptError),
        (connector_error(errno.EPERM), AttemptError),
        (connector_error(errno.ETIMEDOUT), AttemptError),
    ],
)
def test_only_a_host_that_is_down_or_refuses_has_lost_its_server(error: Any, kind: type[Exception]) -> None:
    assert type(ask_module.connect_failure("http://h:1", error)) is kind


@pytest.mark.parametrize(
    ("number", "retries", "waits"),
    [
        (errno.EMFILE, 0, [0.05, 0.1, 0.2, 0.4, 0.8, *[1.0] * 30]),
        (errno.ETIMEDOUT, 40, [*(0.02 * 2**attempt for attempt in range(11)), *[30.0] * 29]),
    ],
)
def test_waits_double_up_to_a_limit_and_those_for_our_own_lack_cost_no_attempt(
    number: int, retries: int, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, pause = aiohttp.TCPConnector.connect, asyncio.sleep
    waited: list[float] = []
    shares: set[tuple[float, float]] = set()

    async def fail_at_first(self: aiohttp.TCPConnector, *args: Any, **kwargs: Any) -> Any:
        if len(waited) < len(waits):
            raise connector_error(number)
        return await connect(self, *args, **kwargs)

    async def sleep_at_once(seconds: float, *args: Any) -> None:
        waited.append(seconds)
        await pause(0)

    def longest(low: float, high: float) -> float:
        shares.add((low, high))
        return high

    async def one(url: str) -> int:
        async with make_client([url], retries=retries, request_deadline_s=1e6) as client:
            return len(await client.generate(make_prompts(1)[0].tokens, client.sampling(2)))

    with FakeSGLang() as fake, monkeypatch.context() as patch:
        patch.setattr(aiohttp.TCPConnector, "connect", fail_at_first)
        patch.setattr("asyncio.sleep", sleep_at_once)
        patch.setattr("random.uniform", longest)
        assert asyncio.run(one(fake.url)) == 2
    assert waited == pytest.approx(waits)
    assert shares == {(0.5, 1.0)}, "each wait is drawn from its upper half, so that groups do not come back together"


def test_a_name_that_does_not_resolve_costs_attempts_and_not_the_server() -> None:
    error = dropped("http://absent.invalid:1", retries=1)
    assert error.reason is DropReason.INCOMPLETE
    assert "absent.invalid" in str(error)


def test_no_proxy_of_the_environment_stands_between_client_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, closed_url())
    with FakeSGLang() as fake:
        assert len(collect(make_prompts(2), make_client([fake.url]), group_size=2, progress=False)[0]) == 2


def test_what_fails_after_a_push_says_nothing_of_a_server_that_the_push_named_anew() -> None:
    """The old answer is of wrong weights, so the server is asked once more. The second such answer excludes it."""
    with FakeSGLang(lambda index, body: "hang" if index == 0 else "ok") as fake:
        client = make_client([fake.url])
        client.use_servers([fake.url], (7,))
        worker = threading.Thread(
            target=collect, args=(make_prompts(1), client), kwargs={"group_size": 2, "progress": False}
        )
        worker.start()
        wait_until(lambda: fake.open == 1, "the request is open")
        client.use_servers([fake.url], (7,))
        fake.release()
        worker.join(10)
    assert (len(fake.requests), client.wrong_versions) == (2, 4)


STATUSES = st.sampled_from([200, 200, 200, 200, 201, 204, 301, 400, 401, 404, 413, 422, 429, 500, 503])
BODIES = (
    st.binary(max_size=64) | st.text(max_size=32).map(str.encode) | st.just(b"[]") | st.just(b'[{"meta_info":{}},7]')
)


def answer_to(reply: Reply) -> DropReason:
    with FakeSGLang(lambda index, body: reply) as fake:
        return dropped(fake.url, retries=0, request_deadline_s=2.0).reason  # so long it asks a busy server


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(STATUSES, BODIES)
def test_whatever_bytes_a_server_sends_a_group_is_dropped_with_its_reason(status: int, body: bytes) -> None:
    reason = answer_to(text(body, status))
    assert reason is (DropReason.REFUSED if status in (400, 413, 422) else DropReason.INCOMPLETE)


def raw_server(answer: bytes) -> socket.socket:
    """Start a socket that reads a request, answers with these bytes, and closes."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(2**16)
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return listening


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello\r\n\r\n",
        b"\x00\xff" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_what_is_no_http_is_an_attempt_that_failed(answer: bytes) -> None:
    with raw_server(answer) as listening:
        error = dropped(f"http://127.0.0.1:{listening.getsockname()[1]}", retries=1)
    assert error.reason is DropReason.INCOMPLETE
    assert str(error).startswith("2 attempts failed")
