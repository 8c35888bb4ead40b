"""The journal of one replica: what comes back of it, which groups stand for requests, and how large it gets."""

from __future__ import annotations

import random
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.loop.journal.found import folder_of, read_journals, segments
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.records import Start, Taken, dump
from megatron_dypo.loop.journal.weights import Weights
from megatron_dypo.loop.journal.writer import SegmentWriter
from megatron_dypo.types import GradedGroup, Rollout, RolloutGroup, Tier, Verdict
from tests.support.loop_cases import Prompts

KNOWN = {3: "three", 4: "four", 5: "five"}


def decode(tokens: Any) -> str:
    return " ".join(map(str, tokens))


def open_(
    root: Path,
    *,
    setting: str = "s",
    limit_bytes: int = 2**30,
    known: dict[int, str] | None = None,
    replica: int = 0,
    replicas: int = 1,
) -> Journal:
    """Open the journal as a run does, ``known`` being the digests of its weights."""
    found = read_journals(root, replica=replica, replicas=replicas, setting=setting)
    journal = Journal(
        writer=SegmentWriter(
            folder_of(root, replica), start=dump(Start(setting=setting, replicas=replicas)), limit_bytes=limit_bytes
        ),
        weights=Weights(digest=lambda: "?", keeps=9, known=KNOWN if known is None else known),
        decode=decode,
        max_version_lag=1,
        found=found,
    )
    journal.adopt()
    return journal


def group_of(order: int, *, versions: Sequence[int] = (5, 5), seed: int = 0, tokens: int = 6) -> GradedGroup:
    """Make a group with every field set; the first rollout begins with forced tokens."""
    rng = np.random.default_rng([seed, order])
    rollouts = []
    for number, version in enumerate(versions):
        ids = rng.integers(0, 1000, tokens + number).astype(np.int32)
        logp = -rng.random(len(ids)).astype(np.float32)
        logp[: 2 - number] = np.nan
        rollouts.append(
            Rollout(
                tokens=ids,
                logp=logp,
                text=decode(ids),
                finish="stop" if number else "length",
                policy_version=min(versions),
                version_spans=((min(versions), 0), (version, 3)) if version > min(versions) else ((version, 0),),
                num_forced_tokens=2 - number,
                routes=np.full((len(ids), 2, 1), order, np.uint8) if number else None,
            )
        )
    verdicts = (
        Verdict(is_correct=True, reward=0.1 + order),
        Verdict(is_correct=False, reward=-0.5, error=None if order % 2 else "late"),
    )
    return GradedGroup(
        prompt=Prompts().prompt(order),
        rollouts=tuple(rollouts),
        verdicts=verdicts,
        tier=Tier.MID if order % 2 else None,
        trace_verdict=Verdict(is_correct=True, reward=2.0) if order % 3 else None,
    )


def without_verdicts(group: GradedGroup) -> RolloutGroup:
    return RolloutGroup(prompt=group.prompt, rollouts=group.rollouts, verdicts=group.verdicts[:1])


def require_same(found: RolloutGroup | GradedGroup | None, expected: RolloutGroup | GradedGroup) -> None:
    assert found is not None
    assert type(found) is type(expected)
    assert found.prompt.order == expected.prompt.order
    assert found.verdicts == expected.verdicts
    if isinstance(expected, GradedGroup) and isinstance(found, GradedGroup):
        assert (found.tier, found.trace_verdict) == (expected.tier, expected.trace_verdict)
    for one, other in zip(found.rollouts, expected.rollouts, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logp.view(np.uint32), other.logp.view(np.uint32))
        np.testing.assert_equal(one.routes, other.routes)
        assert (one.tokens.dtype, one.logp.dtype) == (np.dtype(np.int32), np.dtype(np.float32))
        for name in ("text", "finish", "policy_version", "version_spans", "num_forced_tokens"):
            assert getattr(one, name) == getattr(other, name)


def recall(journal: Journal, order: int, **options: Any) -> RolloutGroup | GradedGroup | None:
    return journal.recall(Prompts().prompt(order), **options)


def test_groups_come_back_bit_for_bit_graded_or_not_and_each_once(tmp_path: Path) -> None:
    journal = open_(tmp_path)
    graded = [group_of(order, versions=(5, 4) if order == 2 else (5, 5)) for order in range(6)]
    for group in graded[:3]:
        journal.add(group)
    for group in graded[3:]:
        journal.add(without_verdicts(group))
    journal.judge(graded[3:5])
    journal.close()

    resumed = open_(tmp_path)
    for group in graded[:5]:
        require_same(recall(resumed, group.prompt.order), group)
    require_same(recall(resumed, 5), without_verdicts(graded[5]))
    assert (recall(resumed, 0), recall(resumed, 9)) == (None, None)
    assert (resumed.reused, resumed.refused, resumed.count_reused(), resumed.count_reused()) == (6, 0, 6, 0)
    for group in graded[:5]:
        require_same(recall(open_(tmp_path), group.prompt.order), group)


def test_a_draw_that_was_made_again_is_the_last_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        journal = open_(tmp_path)
        journal.add(group_of(1, seed=seed))
        journal.close()
    require_same(recall(open_(tmp_path), 1), group_of(1, seed=2))


@pytest.mark.parametrize(("versions", "known", "version", "expected"), [
    ((5, 5), KNOWN, 5, True),
    ((5, 5), KNOWN, None, True),
    ((4, 4), KNOWN, 5, False),  # a round: a server has version 5 now
    ((4, 5), KNOWN, 5, True),  # a refit came in between
    ((4, 4), KNOWN, None, True),
    ((3, 5), KNOWN, None, False),  # older than it may be
    ((5, 5), {**KNOWN, 5: "other"}, 5, False),
    ((4, 5), {**KNOWN, 4: "other"}, 5, False),
    ((5, 5), {3: "three", 4: "four"}, None, False),  # not made again yet
])  # fmt: skip
def test_a_group_stands_for_a_request_if_a_server_could_have_given_it_now(
    tmp_path: Path, versions: Sequence[int], known: dict[int, str], version: int | None, expected: bool
) -> None:
    journal = open_(tmp_path)
    journal.add(group_of(1, versions=versions))
    journal.close()
    resumed = open_(tmp_path, known=known)
    if version is None:
        assert resumed.may_recall([1]) is expected
    assert (recall(resumed, 1, version=version) is not None) is expected
    assert (resumed.reused, resumed.refused) == (int(expected), int(not expected))


def test_a_group_of_another_prompt_or_configuration_stands_for_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_(tmp_path)
    journal.add(group_of(1))
    journal.close()
    changed = replace(Prompts().prompt(1), tokens=np.array([7, 8], np.int32))
    assert open_(tmp_path).recall(changed) is None
    assert recall(open_(tmp_path), 1) is not None
    assert not caplog.text
    assert recall(open_(tmp_path, setting="other"), 1) is None
    assert "was written under another configuration or for other data; it is not used" in caplog.text


def test_groups_of_weights_that_no_server_got_from_this_run_are_not_written(tmp_path: Path) -> None:
    journal = open_(tmp_path)
    journal.add(group_of(1, versions=(9, 9)))
    journal.judge([group_of(1, versions=(9, 9))])
    journal.add(replace(group_of(3), rollouts=(), verdicts=()))
    assert open_(tmp_path).found.entries == {}


def test_a_new_checkpoint_keeps_what_its_run_may_ask_for_and_nothing_else(tmp_path: Path) -> None:
    journal = open_(tmp_path)
    for order in range(8):
        journal.add(without_verdicts(group_of(order)))
    journal.judge([group_of(order) for order in (1, 2, 7)])
    journal.begin_anew(6, unfinished=[1, 4], cursor=6)
    journal.add(group_of(9))
    journal.close()
    assert len(segments(folder_of(tmp_path, 0))) == 1
    resumed = open_(tmp_path)
    assert sorted(resumed.found.entries) == [1, 4, 6, 7, 9]
    for order in (1, 7, 9):
        require_same(recall(resumed, order), group_of(order))
    require_same(recall(resumed, 4), without_verdicts(group_of(4)))

    again = open_(tmp_path)
    again.begin_anew(8, unfinished=[4], cursor=9)
    require_same(recall(again, 9), group_of(9))
    assert sorted(open_(tmp_path).found.entries) == [4, 9]


@dataclass(kw_only=True)
class BusyWeights(Weights):
    """Weights whose comparison takes as long as ``then``."""

    then: Callable[[], object]

    def are_mine(self, weights: Mapping[int, str]) -> bool:
        self.then()
        return super().are_mine(weights)


def test_a_checkpoint_moves_no_group_away_from_a_stream_that_takes_it(tmp_path: Path) -> None:
    journal = open_(tmp_path)
    journal.add(group_of(1))
    journal.close()
    resumed = open_(tmp_path)
    saving = threading.Thread(target=resumed.begin_anew, args=(6, [1], 7))

    def save() -> None:
        saving.start()
        saving.join(0.5)  # it ends now, or waits until the group is read

    resumed.weights = BusyWeights(digest=lambda: "?", keeps=9, known=KNOWN, then=save)
    require_same(recall(resumed, 1), group_of(1))
    saving.join(10)
    assert not saving.is_alive()
    assert (resumed.reused, resumed.refused) == (1, 0)
    assert len(segments(folder_of(tmp_path, 0))) == 1
    require_same(recall(open_(tmp_path), 1), group_of(1))


def test_a_checkpoint_keeps_the_lists_of_collections_since_it_was_begun(tmp_path: Path) -> None:
    """A save in the background is published during later steps."""

    def lists() -> tuple[dict[int, list[Taken]], dict[int, list[int]], bool, bool]:
        found = open_(tmp_path)
        return found.found.taken, found.found.passed, found.is_over(4), found.is_over(5)

    journal = open_(tmp_path)
    journal.take(3, 0, [1])
    journal.take(4, 2, [2, 3])
    journal.compute_logprobs(4, 2)
    journal.serve(5)
    expected = {4: [Taken(step=4, look=2, orders=(2, 3), weights="four")]}, {4: [2]}, True, False
    journal.begin_anew(4, unfinished=[2, 3], cursor=9)
    assert lists() == expected
    repeated = open_(tmp_path)
    repeated.found.taken.pop(4)  # as the repeated collection does
    repeated.begin_anew(4, unfinished=[2, 3], cursor=9)
    assert lists() == expected
    repeated.forget_collections(4)
    repeated.begin_anew(4, unfinished=[2, 3], cursor=9)
    assert lists() == ({}, {}, False, False)


def test_a_journal_at_its_limit_says_so_once_and_goes_on_after_the_next_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_(tmp_path, limit_bytes=2**20)
    for order in range(40):
        journal.add(group_of(order, tokens=5000))
    held = sorted(open_(tmp_path).found.entries)
    assert held == list(range(len(held)))
    assert 0 < len(held) < 20
    assert sum(path.stat().st_size for path in segments(folder_of(tmp_path, 0))) <= 2**20 + 200
    assert caplog.text.count("has reached rollout.journal_mib=1") == 1
    journal.begin_anew(6, unfinished=[], cursor=40)
    journal.add(group_of(41))
    assert sorted(open_(tmp_path).found.entries) == [41]


@contextmanager
def full_disk(free_bytes: int, path: Path) -> Iterator[None]:
    """Let no file of this process grow beyond the size of ``path`` and ``free_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + free_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_journal_and_not_the_run(tmp_path: Path) -> None:
    journal = open_(tmp_path)
    journal.add(group_of(1, tokens=100_000))
    (segment,) = segments(folder_of(tmp_path, 0))
    with full_disk(50_000, segment):
        journal.add(group_of(3, tokens=100_000))
    journal.add(group_of(5))
    assert sorted(open_(tmp_path).found.entries) == [1]
    journal.begin_anew(6, unfinished=[1], cursor=7)
    journal.add(group_of(7))
    assert sorted(open_(tmp_path).found.entries) == [1, 7]


def test_a_damaged_journal_gives_right_groups_or_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal, groups = open_(tmp_path / "whole"), [group_of(order) for order in range(3)]
    for group in groups:
        journal.add(group)
    journal.close()
    (segment,) = segments(folder_of(tmp_path / "whole", 0))
    content, draw = segment.read_bytes(), random.Random(7)
    for number in range(60):
        root = tmp_path / str(number)
        folder_of(root, 0).mkdir(parents=True)
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        cut = len(content) if number % 2 else draw.randrange(len(content))
        (folder_of(root, 0) / segment.name).write_bytes(damaged[:cut])
        caplog.clear()
        resumed = open_(root)
        found = [recall(resumed, order) for order in range(3)]
        num_found = sum(one is not None for one in found)
        assert all(one is None for one in found[num_found:])
        for one, group in zip(found[:num_found], groups, strict=False):
            require_same(one, group)
        if cut == len(content):
            assert num_found < 3
            assert "a record is damaged" in caplog.text
