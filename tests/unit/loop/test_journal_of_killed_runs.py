"""Runs that are killed at seeded moments: no group of their journals is made again, no draw is lost or doubled."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig, OldLogpConfig
from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.loop.journal.found import read_journals
from megatron_dypo.loop.setup.open_journal import setting_of
from tests.support.journal_cases import Attempt, Stored, journaled
from tests.support.loop_cases import ROUND, make_config

STEPS = 5
TRAINER: dict[str, Any] = {
    "old_logp": OldLogpConfig(source="trainer"),
    "objective": ObjectiveConfig(importance=ImportanceConfig(cap=2.0)),
}
CASES: dict[str, dict[str, Any]] = {
    "sync": {"rollout": {}},
    "sync, two rounds": {"rollout": {"prompts_per_round": ROUND // 2}},
    "async": {"rollout": {"mode": "async"}},
    "async, log-probs of the trainer": {"rollout": {"mode": "async"}, **TRAINER},
    "async, saved in the background": {
        "rollout": {"mode": "async"},
        "checkpoint": CheckpointConfig(every=2, keep=9, async_save=True),
    },
    "oversampled": {"rollout": {"oversample": 1.5}},
    "sft": {"rollout": {}, "objective": ObjectiveConfig(name="sft")},
}
WORLDS = {"one replica": (1, 1), "two replicas": (2, 1), "two replicas of two ranks": (4, 2)}
NUM_FAST = 2
"""Seeds of each case that are always run; the others are slow together."""
MOMENTS = [
    *(
        pytest.param(case, "one replica", seed, marks=() if seed < NUM_FAST else pytest.mark.slow)
        for case in CASES
        for seed in range(5)
    ),
    *(("sync", world, 10) for world in WORLDS),
    *((case, world, 10) for case in ("async", "oversampled") for world in WORLDS),
    *(pytest.param(case, world, 11, marks=pytest.mark.slow) for case in ("sync", "async") for world in WORLDS),
]
"""Each is a run that is killed up to three times."""


def config_of(case: str, run_dir: Path) -> Config:
    options = {"checkpoint": CheckpointConfig(every=2, keep=9), **CASES[case]}
    return make_config(run_dir, steps=STEPS, **{**options, "rollout": {"max_in_flight": 2, **options["rollout"]}})


@pytest.mark.parametrize(("case", "world", "seed"), MOMENTS)
def test_finished_groups_are_made_once_and_every_draw_is_on_one_account(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, world: str, seed: int
) -> None:
    config, draw = config_of(case, tmp_path), random.Random(f"{case} {world} {seed}")
    stored: Stored | None = None
    finished, made, learned = set[int](), dict[int, str](), dict[int, list[int]]()
    for kill_at in (*(draw.randrange(10, 90) for _ in range(3)), None):
        attempt = Attempt(config=config, world=WORLDS[world], kill_at=kill_at, stored=stored).make()
        assert not finished & set(attempt.asked), "a group that the journal had was made again"
        assert all(made.get(version, digest) == digest for version, digest in attempt.versions.items())
        made |= attempt.versions
        learned |= attempt.learned
        finished |= journaled(tmp_path)
        stored = attempt.checkpoint
        if not attempt.is_killed:
            break
    assert sorted(made) == list(range(1, STEPS + 1))
    entered = [order for orders in learned.values() for order in orders]
    assert len(entered) == len(set(entered))
    assert "does not balance" not in caplog.text
    assert stored is not None
    ledger = Ledger.from_json(stored.trainer_state["ledger"])
    assert ledger.trained.total() == len(entered)


@pytest.mark.parametrize("case", ["sync", "sync, two rounds", "sft"])
def test_a_synchronous_run_that_is_killed_ends_as_the_one_that_is_not(tmp_path: Path, case: str) -> None:
    whole = Attempt(config=config_of(case, tmp_path / "whole")).make()
    draw = random.Random(case)
    for number in range(3):
        config = config_of(case, tmp_path / str(number))
        killed = Attempt(config=config, kill_at=draw.randrange(whole.ticks.count)).make()
        assert killed.is_killed
        resumed = Attempt(config=config, stored=killed.checkpoint).make()
        assert {**killed.versions, **resumed.versions} == whole.versions
        assert resumed.versions[STEPS] == whole.versions[STEPS]


def test_a_journal_of_two_replicas_is_dealt_to_one_and_of_one_to_two(tmp_path: Path) -> None:
    for number, worlds in enumerate((((2, 1), (1, 1)), ((1, 1), (2, 1)))):
        config = config_of("sync", tmp_path / str(number))
        killed = Attempt(config=config, world=worlds[0], kill_at=12).make()
        finished = journaled(tmp_path / str(number))
        assert killed.is_killed
        assert killed.checkpoint is None
        assert finished
        resumed = Attempt(config=config, world=worlds[1]).make()
        assert not finished & set(resumed.asked)
        assert set(range(ROUND)) - finished <= set(resumed.asked)


def test_groups_of_a_round_get_their_verdicts_once_from_a_stream(tmp_path: Path) -> None:
    """The run is killed before it has graded its round, and goes on with ``rollout.mode: async``."""
    for case, kill_at in (("sync", ROUND), ("async", 30)):
        config = replace(config_of(case, tmp_path), checkpoint=CheckpointConfig(every=0))
        attempt = Attempt(config=config, kill_at=kill_at).make()
        assert attempt.is_killed
        found = read_journals(tmp_path / "journal", replica=0, replicas=1, setting=setting_of(config, {}))
        of_round = [found.entries[order].logged for order in range(ROUND)]
        assert [logged.is_graded for logged in of_round] == [case == "async"] * ROUND
    assert not set(range(ROUND)) & set(attempt.asked)


def test_weights_that_came_out_otherwise_take_no_group_of_the_lost_ones(tmp_path: Path) -> None:
    """The groups of the weights of the checkpoint stay of use; those of later weights are sampled again."""
    config = make_config(tmp_path, steps=3, checkpoint=CheckpointConfig(every=0))
    whole = Attempt(config=config).make()  # its last step saves and empties the journal
    config = make_config(tmp_path / "killed", steps=9, checkpoint=CheckpointConfig(every=0))
    Attempt(config=config, kill_at=whole.ticks.count).make()
    finished = journaled(tmp_path / "killed")
    assert len(finished) > 2 * ROUND
    resumed = Attempt(config=config, drift=0.5).make()
    first = {order for order in finished if order < ROUND}
    assert not first & set(resumed.asked)
    assert finished - first <= set(resumed.asked)


@pytest.mark.parametrize("case", ["async", "oversampled", "sync, two rounds"])
def test_weights_that_came_out_otherwise_lose_and_double_no_draw(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    config = config_of(case, tmp_path)
    killed = Attempt(config=config, kill_at=75).make()
    assert killed.is_killed
    resumed = Attempt(config=config, stored=killed.checkpoint, drift=0.5).make()
    first = killed.checkpoint.step if killed.checkpoint else 0
    assert sorted(resumed.learned) == list(range(first + 1, STEPS + 1))
    learned = [*(killed.learned[step] for step in range(1, first + 1)), *resumed.learned.values()]
    entered = [order for orders in learned for order in orders]
    assert len(entered) == len(set(entered))
    assert "does not balance" not in caplog.text
    assert resumed.checkpoint is not None
    assert Ledger.from_json(resumed.checkpoint.trainer_state["ledger"]).trained.total() == len(entered)
