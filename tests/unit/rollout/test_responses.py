"""SGLang's wire format."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dypo.rollout.responses import IncompleteGroupError, WrongVersionError, parse_group
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.types import Tokens
from tests.support.fake_sglang import sample

BODY: dict[str, Any] = {"input_ids": [9]}


def sampling(n: int = 1, max_new_tokens: int = 16) -> Sampling:
    return Sampling(n=n, temperature=1.0, max_new_tokens=max_new_tokens, top_p=1.0, top_k=-1, stop_token_ids=(2, 5))


def decode(tokens: Tokens) -> str:
    return str(tokens.tolist())


@pytest.mark.parametrize(
    ("meta", "version"),
    [
        ({"weight_version": "default"}, 0),
        ({"weight_version": "7"}, 7),
        ({"weight_version": "8", "weight_versions": [{"version": "8", "start": 0, "end": 3}]}, 8),
        (
            {
                "weight_version": "8",
                "weight_versions": [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 3}],
            },
            7,
        ),
        (
            {
                "weight_version": "1",
                "weight_versions": [
                    {"version": "default", "start": 0, "end": 2},
                    {"version": "1", "start": 2, "end": 3},
                ],
            },
            0,
        ),
    ],
)
def test_the_version_of_a_rollout_is_that_of_its_first_token(meta: dict[str, Any], version: int) -> None:
    (rollout,) = parse_group([sample(BODY, 0, **meta)], sampling(), decode)
    assert rollout.policy_version == version


def test_a_version_that_no_push_of_ours_made_is_an_error() -> None:
    with pytest.raises(WrongVersionError, match=r"weights of version v1\.2"):
        parse_group([sample(BODY, 0, weight_version="v1.2")], sampling(), decode)


def spans(*versions: str) -> list[dict[str, Any]]:
    return [{"version": version, "start": i, "end": i + 1} for i, version in enumerate(versions)]


@pytest.mark.parametrize("versions", [["8"], ["7", "8"], ["5", "7", "8"]])
def test_a_response_that_ends_with_the_pushed_version_is_of_it(versions: list[str]) -> None:
    response = sample(BODY, 0, weight_version="8", weight_versions=spans(*versions))
    (rollout,) = parse_group(response, sampling(), decode, versions=range(8, 9))
    assert rollout.policy_version == int(versions[0])
    assert rollout.version_spans == tuple((int(version), i) for i, version in enumerate(versions))


def test_a_response_that_began_and_ended_before_the_last_push_is_taken_where_that_is_allowed() -> None:
    response = sample(BODY, 0, weight_version="7", weight_versions=spans("6", "7"))
    (rollout,) = parse_group(response, sampling(), decode, versions=range(7, 9))
    assert rollout.version_spans == ((6, 0), (7, 1))
    with pytest.raises(
        WrongVersionError, match=r"weights of version 6, 7; the last refit was of 9, the one before of 8$"
    ):
        parse_group(response, sampling(), decode, versions=range(8, 10))


@pytest.mark.parametrize("versions", [["default"], ["7"], ["9"], ["failed-8"], ["default", "8"], ["failed-7", "8"]])
def test_a_response_of_any_other_version_is_refused(versions: list[str]) -> None:
    response = sample(BODY, 0, weight_version=versions[-1], weight_versions=spans(*versions))
    with pytest.raises(WrongVersionError, match=rf"weights of version {', '.join(versions)}; the last refit was of 8$"):
        parse_group(response, sampling(), decode, versions=range(8, 9))


def test_one_response_of_another_version_refuses_its_group() -> None:
    with pytest.raises(WrongVersionError):
        parse_group([sample(BODY, 0, weight_version="8"), sample(BODY, 1)], sampling(2), decode, versions=range(8, 9))


def test_a_single_response_is_an_object() -> None:
    (rollout,) = parse_group(sample(BODY, 0), sampling(), decode)
    assert rollout.text == "[9, 0, 2]"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[-1.0, 9, None]], "1 log-probs for 3 tokens"),
        ([[-1.0, 9, None], [-2.0, 0, None], [-3.0, 3, None]], "of other tokens"),
    ],
)
def test_log_probs_that_do_not_match_the_tokens_make_a_group_incomplete(rows: list[Any], message: str) -> None:
    with pytest.raises(IncompleteGroupError, match=message):
        parse_group([sample(BODY, 0), sample(BODY, 1, output_token_logprobs=rows)], sampling(2), decode)


def test_an_unfinished_response_makes_a_group_incomplete() -> None:
    with pytest.raises(IncompleteGroupError, match="finish_reason None"):
        parse_group([sample(BODY, 0, finish_reason=None)], sampling(), decode)


def test_a_response_without_tokens_makes_a_group_incomplete() -> None:
    empty = sample(BODY, 0, output_token_logprobs=[])
    with pytest.raises(IncompleteGroupError, match="without tokens"):
        parse_group([{**empty, "output_ids": []}], sampling(), decode)
