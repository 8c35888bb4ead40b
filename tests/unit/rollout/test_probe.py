"""Small questions to a server that may answer anything."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.router import Router
from megatron_dypo.rollout.server.probe import http_status, log_probs_are_untempered, request_json

LOG_PROBS = b'{"meta_info": {"output_token_ids_logprobs": [[[-1, 1], [-2, 2], [-3, 3], [-4, 4]]]}}'
"""An answer to the question whether log-probs depend on the temperature: they do not."""


class Answering:
    """A server that gives one answer to everything."""

    status = 200
    body = b""
    headers: tuple[tuple[str, str], ...] = ()
    keys: tuple[str | None, ...] = ()
    asked: tuple[bytes, ...] = ()

    def __init__(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.keys += (self.headers["Authorization"],)
                fake.asked += (self.rfile.read(int(self.headers["Content-Length"] or 0)),)
                self.send_response(fake.status)
                for name, value in (*fake.headers, ("Content-Length", str(len(fake.body)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(fake.body)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Print nothing: nobody reads it."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fake() -> Iterator[Answering]:
    server = Answering()
    yield server
    server.stop()


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"a": 1', b"[" * 100_000, b"9" * 5000, b"\xff", b"1" + b" " * 2**20]
)
def test_an_answer_that_is_no_json_or_too_long_has_no_payload(fake: Answering, body: bytes) -> None:
    fake.body = body
    assert request_json("GET", fake.url, None) == (200, None)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_with_the_key(fake: Answering, status: int) -> None:
    fake.status, fake.headers = status, (("Location", f"{fake.url}/elsewhere"),)
    assert http_status(f"{fake.url}/health", "key") == status
    assert request_json("POST", f"{fake.url}/workers", "key", {}) == (status, None)
    assert fake.keys == ("Bearer key",) * 2


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b'{"meta_info": {}}',
        b'{"meta_info": {"output_token_ids_logprobs": [[[-1, 1], [-2, 2]]]}}',
        b'{"meta_info": {"output_token_ids_logprobs": [[[NaN, 1], [-2, 2], [-3, 3], [-4, 4]]]}}',
        b'{"meta_info": {"output_token_ids_logprobs": [[[null, 1], [-2, 2], [-3, 3], [-4, 4]]]}}',
        LOG_PROBS + b" " * 2**20,  # too long
    ],
)
def test_a_server_without_log_probs_is_named(fake: Answering, body: bytes) -> None:
    fake.body = body
    with pytest.raises(ValueError, match=f"{fake.url}/generate"):
        log_probs_are_untempered(fake.url, None)


def test_the_question_of_log_probs_is_one_token_at_two_temperatures(fake: Answering) -> None:
    fake.body = LOG_PROBS
    assert log_probs_are_untempered(fake.url, None)
    tempered, plain = sorted(
        (json.loads(body) for body in fake.asked), key=lambda b: b["sampling_params"]["temperature"]
    )
    assert plain["sampling_params"] == {"max_new_tokens": 1, "temperature": 1.0}
    assert tempered == {**plain, "sampling_params": {"max_new_tokens": 1, "temperature": 0.5}}
    assert plain["return_logprob"]
    assert plain["token_ids_logprob"] == plain["input_ids"]


def test_a_server_that_fails_on_the_question_is_named(fake: Answering) -> None:
    fake.status = 500
    with pytest.raises(ValueError, match=rf"{fake.url}/generate does not give log-probs .*500"):
        log_probs_are_untempered(fake.url, None)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"workers": 1}', b'{"workers": [1]}', b'{"workers": [{"url": "http://a:1"}]}'],
)
def test_what_answers_but_is_no_router_is_in_the_log(
    fake: Answering, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fake.body = body
    Router(fake.url, "key", deadline_s=0.1).use_servers(["http://a:1"])
    assert f"router {fake.url} does not answer after 0.1 s" in caplog.text


@pytest.mark.parametrize("key", ["two words", "k3y\n", "k3y\t", "schlüssel", "bell\x07"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(ValueError, match="A_KEY: must be printable") as caught:
        read_api_key("A_KEY")
    assert key.strip() not in str(caught.value)


def test_a_key_that_is_empty_or_not_set_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "")
    assert read_api_key("A_KEY") is None
    monkeypatch.delenv("A_KEY")
    assert read_api_key("A_KEY") is None
    monkeypatch.setenv("A_KEY", "sk-0_A+/=")
    assert read_api_key("A_KEY") == "sk-0_A+/="
