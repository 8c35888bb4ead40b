"""Answers read with arrays have the values that ``json.loads`` gives, or the same error."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.rollout.columns import LogprobRows, read_columns

IDS = [5, 0, 151_000, 2**31 - 1]
LOGP = [-0.5, 0.0, -1.25e-07, -9999.0]


def rows(logp: list[float], ids: list[int]) -> list[list[Any]]:
    return [[one, token, None] for one, token in zip(logp, ids, strict=True)]


def written(value: Any) -> bytes:
    """Write JSON as SGLang does: without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def answer(ids: list[Any], logprobs: Any, **meta: Any) -> bytes:
    fields = {"finish_reason": None, "output_token_logprobs": logprobs, "weight_version": "3", **meta}
    return written([{"text": "1, [2]]", "output_ids": ids, "meta_info": fields, "index": 0}] * 2)


def plain(value: Any) -> Any:
    """Return an answer with lists in place of arrays."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, LogprobRows):
        return rows(value.logp.tolist(), value.ids.tolist())
    if isinstance(value, memoryview):
        return value.tobytes().decode()
    return [plain(item) for item in value] if isinstance(value, list) else getattr(value, "tolist", lambda: value)()


def same(left: Any, right: Any) -> bool:
    """Tell whether two values of JSON are equal, types included; a log-prob may be an integer or the equal float."""
    return repr(exact(left)) == repr(exact(right))


def exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    if not isinstance(value, list):
        return value
    is_row = len(value) == 3 and type(value[0]) in (int, float) and abs(value[0]) < 1e300
    return [value[0] + 0.0, *value[1:]] if is_row else [exact(item) for item in value]


def outcome(read: Any, body: bytes) -> Any:
    try:
        return plain(read(body))
    except (ValueError, RecursionError) as error:
        return type(error)


def check(body: bytes) -> None:
    assert same(outcome(read_columns, body), outcome(json.loads, body)), body


def test_lists_as_sglang_writes_them_become_arrays() -> None:
    for output in read_columns(answer(IDS, rows(LOGP, IDS))):
        assert output["output_ids"].dtype == np.int64
        assert output["output_ids"].tolist() == IDS
        found = output["meta_info"]["output_token_logprobs"]
        assert (found.logp.tolist(), found.ids.tolist()) == (LOGP, IDS)
        assert (output["text"], output["index"], output["meta_info"]["weight_version"]) == ("1, [2]]", 0, "3")


@pytest.mark.parametrize("length", [0, 1, 50, 2**22 - 1, 2**22, 2**22 + 1, 9_000_000])
def test_the_text_of_routes_is_a_part_of_the_body(length: int) -> None:
    body = answer(IDS, rows(LOGP, IDS), routed_experts="/+9="[-(length % 4) :] * (length // 4) + "A" * (length % 4))
    check(body)
    for output in read_columns(body):
        found = output["meta_info"]["routed_experts"]
        assert isinstance(found, memoryview)
        assert found.obj is body, "a text that is long must not be copied"


@pytest.mark.parametrize("text", [r"A\/A", r"A\"", r"\u0041", "A" * 2**22 + r"\/", "A" * (2**22 - 1) + r"\/", r"\""])
def test_a_text_of_routes_with_escapes_is_read_as_json_has_it(text: str) -> None:
    check(b'[{"output_ids":[1],"meta_info":{"routed_experts":"' + text.encode() + b'","x":"y"}}]')


@pytest.mark.parametrize("value", [b"null", b"[1]", b'["AA"]', b'""', b'"AA', b'"AA"5', b' "AA"', b'{"a":"AA"}', b"5"])
@pytest.mark.parametrize("name", [b"routed_experts", b"output_token_logprobs"])
def test_another_kind_of_value_is_read_as_json_has_it(name: bytes, value: bytes) -> None:
    check(b'[{"output_ids":[1],"meta_info":{"' + name + b'":' + value + b"}}]")
    check(b'[{"output_ids":' + value + b',"meta_info":{}}]')


def test_one_response_is_an_object_of_its_own() -> None:
    body = written({"output_ids": [7], "meta_info": {"output_token_logprobs": [[-1, 7, None]]}})
    found = read_columns(body)
    assert (found["output_ids"].tolist(), found["meta_info"]["output_token_logprobs"].logp.tolist()) == ([7], [-1.0])


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=50))
def test_every_float_is_read_to_its_last_bit(bits: list[bytes]) -> None:
    values = [struct.unpack("d", one)[0] for one in bits]
    floats = [value for value in values if abs(value) < 1e15]  # JSON writes others with a plus sign
    body = answer(list(range(len(floats))), rows(floats, list(range(len(floats)))))
    found = read_columns(body)[1]["meta_info"]["output_token_logprobs"]
    assert not floats or found.logp.tobytes() == np.array(floats).tobytes()


NO_NUMBERS = (
    *(".5", "5.", "-.5", "-5.", "05", "-05", "00", "-", "+1", "1e", "1e5", "1E5", "-1e-05", "1.e5", "0x1F", "1_0"),
    *("inf", "nan", "NaN", "-Infinity", "null", "true", "false", "", " 1", "1 ", '"1"', "[1]", "{}", "-0", "-0.0", "0"),
    *(
        "1e400",
        "-" + "9" * 400,
        "9" * 5000,
        "-0." + "3" * 5000,
        "2147483648",
        "9223372036854775808",
        "-1",
        "1.0",
        "1,2",
    ),
    *("nu5ll", "1]", "]1", "[", "],[", "1],[2", "]]", "null],[1", "\n1", "\\n", "1\r"),
)
"""Texts in place of a number. Some are JSON."""


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_whatever_stands_in_place_of_a_number_is_read_as_json_has_it(text: str) -> None:
    sound = answer([11, 22, 33], rows([-0.75, -0.25, -0.125], [11, 22, 33]))
    for number in (b"-0.75", b"-0.25", b"-0.125", b"11", b"22", b"33", b"11,null", b"22,null", b"null"):
        for count in (1, 2, 9):
            check(sound.replace(number, text.encode(), count))
        check(sound.replace(number, text.encode() + number))
        check(sound.replace(number, number + text.encode()))


@pytest.mark.parametrize(
    "text",
    [
        b"[[-1,[5,null],2,3,null]]",
        b"[[-1,5,null],[-1,[5,null],2,3,null]]",
        b"[[-1,5,null],2,[-1,5,null]]",
        b"[[-1,5,null],[-1,5,null],]",
        b"[[-1,5,null]5,[-1,5,null]]",
        b"[[-1,5,null],5[-1,5,null]]",
        b"[[-1,5,null],[-1,5]]",
        b"[[-1,5],[-1,5,null]]",
        b"[[-1,5,null,null]]",
        b"[[-1,5,null],[]]",
        b"[[[-1,5,null]]]",
        b'[[-1,5,"]]"]]',
        b'[[-1,5,"a"]]',
        b"[[-1, 5, null]]",
        b"[[-1,5,null] ,[-1,5,null]]",
        b"[[]]",
        b"[]",
        b"[[-1,5,null]",
        b"[[-1,5,null]]]",
    ],
)
def test_rows_of_another_form_are_read_as_json_has_them(text: bytes) -> None:
    check(b'[{"output_ids":[5],"meta_info":{"output_token_logprobs":' + text + b"}}]")


@pytest.mark.parametrize(
    "body",
    [
        b'{"output_ids":[1],"output_ids":[2]}',
        b'{"output_ids":[1],"output_ids":"x"}',
        b'{"output_ids":"x","output_ids":[1]}',
        b'{"x\\"output_ids":[1],"output_ids":[2]}',
        b'{"text":"\\"output_ids\\":[1]","output_ids":[2]}',
        b'{"text":"\\\\","output_ids":[2]}',
        b'{"text":"a"output_ids":[1]}',
        b'"output_ids":[1]',
        b'{"meta_info":{"output_ids":[1],"output_token_logprobs":[[-1,2,null]]},"output_token_logprobs":[[-3,4,null]]}',
        b'[["output_ids",[1]]]',
        b'{"output_ids":[1,2',
        b'{"output_ids":[1,2]',
        b'{"output_ids":[1,2]}}',
        b'{"output_ids":[1]2}',
        b'{"output_ids":[1],}',
        b"\xff\xfe[\x00]\x00",
        b'\xef\xbb\xbf{"output_ids":[1]}',
        b'{"output_ids":[1],"text":"\xff"}',
        b"[" * 100_000,
        b"",
    ],
)
def test_lists_at_other_places_and_broken_answers_are_as_json_has_them(body: bytes) -> None:
    found, expected = outcome(read_columns, body), outcome(json.loads, body)
    if isinstance(expected, dict):  # a list that no reader uses may be anything
        found, expected = ({name: one.get(name) for name in ("output_ids", "text")} for one in (found, expected))
    assert same(found, expected)


def test_a_server_cannot_name_a_list_of_another_field() -> None:
    body = b'{"x":{"output_ids":[1]},"output_ids":"0","meta_info":{"output_token_logprobs":0}}'
    found = read_columns(body)
    assert found["output_ids"] == "0"
    assert found["meta_info"] == {"output_token_logprobs": 0}
    first, second = (read_columns(body)["x"]["output_ids"] for _ in range(2))
    assert first != second, "what stands for a list differs from answer to answer"


SOUND = answer([11, 22, 33], rows([-0.75, -0.25, -0.125], [11, 22, 33]), routed_experts="AAEC")
PIECES = st.sampled_from([bytes([one]) for one in b'0123456789.,-+eE[]{}":nul x\\\n\xff'])


@settings(max_examples=600, deadline=None, database=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 3), PIECES), min_size=1, max_size=3))
def test_whatever_bytes_change_the_answer_is_as_json_has_it(changes: list[tuple[int, int, bytes]]) -> None:
    body = SOUND
    for place, removed, piece in changes:
        body = body[:place] + piece + body[place + removed :]
    found, expected = outcome(read_columns, body), outcome(json.loads, body)
    if found is expected or same(found, expected):
        return
    if isinstance(expected, type):  # a character that only the decoding of the routes refuses
        texts = [(output.get("meta_info") or {}).get("routed_experts") for output in found]
        assert any(isinstance(text, str) and re.search(r"[^\w+/=]", text, re.ASCII) for text in texts), body
        return
    # A key of a changed name may hold a list, which no reader looks for. The fields that are read must be equal.
    assert same(fields(found), fields(expected)), body


def fields(payload: Any) -> Any:
    """Return what a reader of answers looks at."""
    outputs = payload if isinstance(payload, list) else [payload]
    return [
        [output.get("output_ids"), (output.get("meta_info") or {}).get("output_token_logprobs")]
        for output in outputs
        if isinstance(output, dict) and isinstance(output.get("meta_info") or {}, dict)
    ]
