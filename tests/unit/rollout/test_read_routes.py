"""The experts in an answer: read exactly, or refused by name."""

from __future__ import annotations

import base64
import contextlib
import errno
import gc
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.rollout.responses import IncompleteGroupError, parse_group
from megatron_dypo.rollout.routes import RoutesError, RouteShape, allocate, read_routes
from megatron_dypo.rollout.sampling import Sampling, request_body

SHAPE = RouteShape(num_layers=3, per_token=2, num_experts=8)


def encoded(experts: Any) -> str:
    return base64.b64encode(np.asarray(experts, "<i4").tobytes()).decode()


def choice(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 8, (rows, 3, 2))


def test_the_experts_of_all_tokens_but_the_last_are_read() -> None:
    (routes,) = read_routes([encoded(choice(6))], [7], SHAPE)
    assert routes.dtype == np.uint8
    np.testing.assert_array_equal(routes, choice(6))
    many = RouteShape(num_layers=3, per_token=2, num_experts=512)
    assert read_routes([encoded(choice(6))], [7], many)[0].dtype == np.uint16


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "no routed_experts: the server needs --enable-return-routed-experts"),
        (["AAAA"], "no routed_experts"),
        ("", "routed_experts of 0 characters: must be base64 of int32 of shape [6, 3, 2], 192 characters"),
        (encoded(choice(5)), "routed_experts of 160 characters: must be base64 of int32 of shape [6, 3, 2]"),
        (encoded(choice(7)), "routed_experts of 224 characters: must be base64 of int32 of shape [6, 3, 2]"),
        ("A" * 191 + "$", "routed_experts: no base64 of int32"),
        ("A" * 190 + "==", "routed_experts: no base64 of int32"),
        ("A" * 191 + "=", "routed_experts: no base64 of int32"),
        ("A" * 188 + "====", "routed_experts: no base64 of int32"),
        (encoded(np.full((6, 3, 2), 8)), "routed_experts from 8 to 8: must be in [0, 8)"),
        (encoded(np.full((6, 3, 2), -1)), "routed_experts from -1 to -1: must be in [0, 8)"),
        (encoded(np.full((6, 3, 2), 2**31 - 1)), "must be in [0, 8)"),
        ("é" * 192, "routed_experts: no base64 of int32"),
    ],
)
def test_anything_else_is_refused(value: Any, problem: str) -> None:
    kinds = [value, memoryview(value.encode())] if isinstance(value, str) and value.isascii() else [value]
    for one in kinds:
        with pytest.raises(RoutesError, match=re.escape(problem)):
            read_routes([one], [7], SHAPE)


@pytest.mark.parametrize("num_tokens", [2, 14, 4097, 20_000])
def test_routes_of_any_length_are_read_piece_by_piece(num_tokens: int) -> None:
    shape = RouteShape(num_layers=5, per_token=7, num_experts=300)
    experts = np.random.default_rng(num_tokens).integers(0, 300, (num_tokens - 1, 5, 7))
    (routes,) = read_routes([encoded(experts)], [num_tokens], shape)
    np.testing.assert_array_equal(routes, experts)
    (routes,) = read_routes([memoryview(encoded(experts).encode())], [num_tokens], shape)  # as read_columns gives it
    np.testing.assert_array_equal(routes, experts)


def test_large_routes_lie_in_a_file_that_goes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, lengths = open_files(), [40_000, 3, 200_000]
    shape = RouteShape(num_layers=48, per_token=4, num_experts=100)
    arrays = allocate([(length, 48, 4) for length in lengths], shape.dtype)
    for value, array in enumerate(arrays):
        array[...] = value
    assert [(int(array.min()), int(array.max()), array.shape) for array in arrays] == [
        (value, value, (length, 48, 4)) for value, length in enumerate(lengths)
    ]
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    assert len(open_files() - before) == 1, "one file for all"
    del array, arrays
    gc.collect()
    assert open_files() == before


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        allocate([(200_000, 48, 4)], SHAPE.dtype)


def open_files() -> set[tuple[str, str]]:
    """Return the open files of this process, with their numbers."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add((link.name, str(link.readlink())))
    return {(name, target) for name, target in found if "megatron-dypo-routes-" in target or "(deleted)" in target}


def answer(num_tokens: int, **meta: Any) -> dict[str, Any]:
    ids = list(range(10, 10 + num_tokens))
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": "length"},
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "weight_version": "0",
            **meta,
        },
    }


def sampling(n: int, routes: RouteShape | None) -> Sampling:
    return Sampling(n=n, temperature=1.0, max_new_tokens=8, top_p=1.0, top_k=-1, stop_token_ids=(2,), routes=routes)


def test_each_rollout_of_a_request_has_routes_of_its_own() -> None:
    rows = [4 + 2, 4 + 7]
    payload = [answer(length - 3, routed_experts=encoded(choice(length))) for length in rows]
    group = parse_group(payload, sampling(2, SHAPE), str, num_prompt_tokens=4)
    for rollout, length in zip(group, rows, strict=True):
        assert rollout.routes is not None
        np.testing.assert_array_equal(rollout.routes, choice(length))


def test_one_rollout_without_them_spoils_the_group() -> None:
    payload = [answer(3, routed_experts=encoded(choice(6))), answer(3)]
    with pytest.raises(IncompleteGroupError, match="no routed_experts"):
        parse_group(payload, sampling(2, SHAPE), str, num_prompt_tokens=4)


def test_routes_that_nobody_asked_for_are_not_read() -> None:
    (rollout,) = parse_group(answer(3, routed_experts="nonsense"), sampling(1, None), str, num_prompt_tokens=4)
    assert rollout.routes is None


def test_they_are_asked_for_only_where_they_are_read() -> None:
    tokens = np.array([1, 2, 3], np.int32)
    assert request_body(tokens, sampling(1, SHAPE))["return_routed_experts"] is True
    assert "return_routed_experts" not in request_body(tokens, sampling(1, None))


def test_an_answer_with_routes_may_be_as_long_as_they_are() -> None:
    without, with_routes = (sampling(4, routes).max_answer_bytes(1000) for routes in (None, SHAPE))
    assert with_routes - without >= 4 * len(encoded(choice(1000 + 8 - 1)))
