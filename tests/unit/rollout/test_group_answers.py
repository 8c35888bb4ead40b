"""No field of a server's answer is trusted: an answer that is not a whole, sound group is refused by field name."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from megatron_dypo.rollout.responses import IncompleteGroupError, WrongVersionError, parse_group, sampled_lengths
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.types import Rollout, Tokens
from tests.support.fake_sglang import sample

BODY: dict[str, Any] = {"input_ids": [9]}
VOCABULARY = 100


def decode(tokens: Tokens) -> str:
    return str(tokens.tolist())


def sampling(n: int = 2, max_new_tokens: int = 12, stop_token_ids: tuple[int, ...] = (2, 5)) -> Sampling:
    return Sampling(
        n=n, temperature=1.0, max_new_tokens=max_new_tokens, top_p=1.0, top_k=-1, stop_token_ids=stop_token_ids
    )


def parse(payload: Any, n: int = 2, versions: Sequence[int] | None = (3,), **limits: Any) -> tuple[Rollout, ...]:
    return parse_group(payload, sampling(n, **limits), decode, versions=versions, vocab_size=VOCABULARY)


def answer(n: int = 2, **meta: Any) -> list[dict[str, Any]]:
    """Return an answer of weights of version 3 that is sound except for ``meta`` of its last response."""
    whole = [sample(BODY, index, weight_version="3") for index in range(n)]
    whole[-1]["meta_info"] |= meta
    return whole


def of_tokens(tokens: list[Any], finish: dict[str, Any] | None = None, logp: float = -1.0) -> list[dict[str, Any]]:
    """Return a sound answer whose last response has these tokens."""
    rows = [[logp, token, None] for token in tokens]
    whole = answer(output_token_logprobs=rows, finish_reason=finish or {"type": "length", "length": len(tokens)})
    whole[-1]["output_ids"] = tokens
    return whole


def spans(*versions: str) -> dict[str, Any]:
    """Return the version fields of a response; each of these versions sampled one token."""
    found = [{"version": version, "start": i, "end": i + 1} for i, version in enumerate(versions)]
    return {"weight_version": versions[-1], "weight_versions": found}


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, -math.inf, 0.5, 0.01, 1e400, -3.4e38, -(10**400), True, "-1.0", [-1.0], {}]
)
def test_what_is_no_log_prob_makes_the_group_incomplete(value: Any) -> None:
    with pytest.raises(IncompleteGroupError, match=r"log-prob .* of token 1: must be finite and at most 0"):
        parse(answer(output_token_logprobs=[[-1.0, 9, None], [value, 1, None], [-3.0, 2, None]]))


@pytest.mark.parametrize("value", [0, 0.0, -0.0, 1e-7, -50.0, -9])
def test_a_log_prob_may_be_zero_to_rounding_and_as_low_as_a_sampled_token_can_be(value: float) -> None:
    rows = [[-1.0, 9, None], [value, 1, None], [-3.0, 2, None]]
    assert parse(answer(output_token_logprobs=rows))[1].logp[1] == np.float32(value)


def test_a_log_prob_that_sglang_could_not_compute_is_found_in_its_own_json() -> None:
    text = json.dumps(answer()).replace("-2.0", "NaN")
    with pytest.raises(IncompleteGroupError, match="log-prob nan"):
        parse(json.loads(text))


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**31, 10**400, 1.0, 1.5, True, None, "7", [7]])
def test_what_is_no_token_of_the_vocabulary_makes_the_group_incomplete(token: Any) -> None:
    with pytest.raises(IncompleteGroupError, match=r"token id .*: must be an integer in \[0, 100\)"):
        parse(of_tokens([9, token, 3]))


def test_the_last_token_of_the_vocabulary_is_one() -> None:
    assert parse(of_tokens([9, VOCABULARY - 1, 0]))[1].tokens.tolist() == [9, 99, 0]


def test_without_a_vocabulary_ids_are_those_of_32_bits() -> None:
    with pytest.raises(IncompleteGroupError, match="token id 2147483648"):
        parse_group(of_tokens([9, 2**31]), sampling(), decode)
    assert parse_group(of_tokens([2**31 - 1]), sampling(), decode)[1].tokens.tolist() == [2**31 - 1]


def test_a_response_longer_than_asked_for_makes_the_group_incomplete() -> None:
    assert len(parse(of_tokens([7] * 12))[1].tokens) == 12
    with pytest.raises(IncompleteGroupError, match="3000 tokens for max_new_tokens=12"):
        parse(of_tokens([7] * 3000))


@pytest.mark.parametrize(
    ("finish", "rule"),
    [
        ({"type": "stop", "matched": "NaN happened"}, "stopped at 'NaN happened'"),
        ({"type": "stop", "matched": 5}, "ends with token 2 stopped at 5"),
        ({"type": "stop", "matched": True}, "stopped at True"),
        ({"type": "abort", "message": "paused"}, "finish_reason .*abort"),
        ({"type": ["stop"]}, "finish_reason"),
        ({}, "finish_reason"),
        (None, "finish_reason None"),
        ("stop", "finish_reason 'stop'"),
        ([], "finish_reason"),
    ],
)
def test_an_end_that_is_none_makes_the_group_incomplete(finish: Any, rule: str) -> None:
    with pytest.raises(IncompleteGroupError, match=rule):
        parse(answer(finish_reason=finish))


def test_a_stop_at_a_token_that_ends_nothing_makes_the_group_incomplete() -> None:
    stopped = of_tokens([9, 7], {"type": "stop", "matched": 7})
    with pytest.raises(IncompleteGroupError, match=r"stopped at token 7, which is not one of stop_token_ids=\(2, 5\)"):
        parse(stopped)
    assert parse(stopped, stop_token_ids=())[1].finish == "stop"


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_version": None},
        {"weight_version": 3},
        {"weight_version": ""},
        {"weight_versions": {"version": "3"}},
        {"weight_versions": ["3"]},
        {"weight_versions": [{"version": "3"}]},
        {"weight_versions": [{"version": 3, "start": 0}]},
        {"weight_versions": [{"version": "3", "start": 1}]},
        {"weight_versions": [{"version": "3", "start": 0.0}]},
        {"weight_versions": [{"version": "3", "start": "0"}]},
        {"weight_versions": [{"version": "2", "start": 0}, {"version": "3", "start": 0}]},
        {"weight_versions": [{"version": "2", "start": 0}, {"version": "3", "start": 3}]},
        {"weight_versions": [{"version": "2", "start": 0}, {"version": "3", "start": -1}]},
        {"weight_versions": [{"version": "3", "start": 0}, {"version": "2", "start": 1}]},
    ],
)
def test_versions_that_cannot_be_make_the_group_incomplete(changes: dict[str, Any]) -> None:
    with pytest.raises(IncompleteGroupError, match="weight"):
        parse(answer(**changes))


@pytest.mark.parametrize("version", ["٣", "3.0", "-3", " 3", "0x3", "9" * 5000, "v3"])
def test_a_version_that_no_push_names_is_a_wrong_one(version: str) -> None:
    for versions in ((3,), None):
        with pytest.raises(WrongVersionError) as caught:
            parse(answer(weight_version=version), versions=versions)
        assert len(str(caught.value)) < 300, "a message shows the beginning of a long name"


@pytest.mark.parametrize("members", [("20,21", "20,21,23"), ("20,21,22,23", "20,21"), ("3", "23"), ("0", "22")])
def test_only_the_newest_version_of_a_group_says_what_its_server_holds(members: tuple[str, str]) -> None:
    """A long response spans refits; others of its group ended before them."""
    longest = max(len(member.split(",")) for member in members)
    whole: list[dict[str, Any]] = [
        {
            "output_ids": [7] * longest,
            "meta_info": {
                "finish_reason": {"type": "length", "length": longest},
                "output_token_logprobs": [[-1.0, 7, None]] * longest,
                **spans(*member.split(",")),
            },
        }
        for member in members
    ]
    rollouts = parse(whole, versions=(22, 23))
    assert [rollout.policy_version for rollout in rollouts] == [int(member.split(",")[0]) for member in members]


@pytest.mark.parametrize("members", [("21", "20"), ("24", "23"), ("23", "default"), ("23", "failed-22"), ("22", "22")])
def test_a_group_whose_newest_version_is_not_that_of_the_push_is_of_a_wrong_server(members: tuple[str, str]) -> None:
    whole = [sample(BODY, index, weight_version=version) for index, version in enumerate(members)]
    with pytest.raises(WrongVersionError, match="the last refit was of 23"):
        parse(whole, versions=(23,))


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        [],
        "text",
        7,
        [None, None],
        [[], []],
        [{}, {}],
        {"error": {"message": "no"}},
        [{"meta_info": None}] * 2,
    ],
)
def test_what_is_no_answer_makes_the_group_incomplete(payload: Any) -> None:
    with pytest.raises(IncompleteGroupError):
        parse(payload)


@pytest.mark.parametrize("rows", [None, {}, [[-1.0, 9, None]], [[]] * 3, [None] * 3, [[-1.0, True, None]] * 3, "abc"])
def test_log_probs_that_are_not_of_the_tokens_make_the_group_incomplete(rows: Any) -> None:
    with pytest.raises(IncompleteGroupError, match="for 3 tokens, or of other tokens"):
        parse(answer(output_token_logprobs=rows))


def test_lengths_of_what_is_thrown_away_are_told_whatever_is_wrong_with_it() -> None:
    assert sampled_lengths(answer(output_token_logprobs=None)) == [3, 3]
    assert sampled_lengths([None, {"output_ids": None}, {"output_ids": []}, {"output_ids": [1, 2]}, 7]) == [2]
    assert sampled_lengths({"error": 1}) == sampled_lengths("<html>") == []


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Yield every place in a nested value."""
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [path, *(found for key in keys for found in paths(node[key], (*path, key)))]


def changed(payload: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    payload = copy.deepcopy(payload)
    node = payload
    for key in path[:-1]:
        node = node[key]
    change(node, path[-1])
    return payload


SOUND = [
    {**sample(BODY, 0), "meta_info": {**sample(BODY, 0)["meta_info"], **spans("1", "2", "3")}},
    sample(BODY, 1, weight_version="3"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**4000, "3"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "start", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def fuzz(path: tuple[Any, ...], value: Any, is_deleted: bool) -> None:
    """Change or remove one field of a sound answer: the answer is refused, or is still sound."""

    def change(node: Any, key: Any) -> None:
        if is_deleted:
            del node[key]
        else:
            node[key] = value

    payload = changed(SOUND, path, change) if path else value
    assert sum(sampled_lengths(payload)) >= 0
    try:
        rollouts = parse(payload, versions=(2, 3))
    except (IncompleteGroupError, WrongVersionError):
        return
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert 0 < len(rollout.tokens) == len(rollout.logp) <= 12
        assert ((rollout.tokens >= 0) & (rollout.tokens < VOCABULARY)).all()
        assert (np.isfinite(rollout.logp) & (rollout.logp <= 1e-3)).all()
        assert rollout.version_spans[0] == (rollout.policy_version, 0)
    assert max(span[0] for rollout in rollouts for span in rollout.version_spans) in (2, 3)


@seed(1)
@settings(max_examples=200, deadline=None, database=None)
@given(st.sampled_from(paths(SOUND)), JSON, st.booleans())
def test_whatever_one_field_of_an_answer_is_the_group_is_sound_or_refused(
    path: tuple[Any, ...], value: Any, is_deleted: bool
) -> None:
    fuzz(path, value, is_deleted)


@pytest.mark.slow
@seed(2)
@settings(max_examples=10_000, deadline=None, database=None)
@given(st.sampled_from(paths(SOUND)), JSON, st.booleans())
def test_whatever_one_field_of_an_answer_is_the_group_is_sound_or_refused_at_length(
    path: tuple[Any, ...], value: Any, is_deleted: bool
) -> None:
    fuzz(path, value, is_deleted)
