"""The config of a smoke run: one step of the real run, without its files."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_dypo.config.reading.load import changed_lines, dump_config, parse_config
from megatron_dypo.config.smoke import VERIFIER, smoke_config
from megatron_dypo.config.tree import Config
from megatron_dypo.grading.smoke import judge

REAL: dict[str, dict[str, Any]] = {
    "run": {"dir": "runs/a", "steps": 50},
    "model": {"hf_path": "m", "mcore_path": "weights"},
    "data": {"prompts": ["p"], "drop_wrong_traces": True, "fields": {"verifier": "how"}},
    "parallel": {"tensor": 4, "pipeline": 2, "sequence": True},
    "rollout": {"servers": {"extra_args": ["--ep-size", "2"]}},
    "grading": {"verifier": "mine:score", "by_source": {"a": "exact"}, "workers": 7},
    "objective": {"alpha": "auto", "sft_steps": 20, "rl_only_steps": 30},
    "optimizer": {"warmup_steps": 10, "lr": 3e-6},
    "eval": {"sets": {"a": {"path": "x"}}},
    "probe": {"every": 5},
    "profile": {"steps": [1, 3]},
    "logging": {"wandb": True},
}


def real(**run: object) -> Config:
    return parse_config({**REAL, "run": {**REAL["run"], **run}}, where="here")


def test_a_run_that_is_none_stays_as_it_is() -> None:
    config = real()
    assert smoke_config(config) is config


def test_only_what_needs_weights_verdicts_or_a_second_step_changes() -> None:
    before, after = real(smoke=True), smoke_config(real(smoke=True))
    changed = {line.partition(": ")[0] for line in changed_lines(dump_config(before), dump_config(after))}
    assert changed == {
        "run.dir",
        "run.steps",
        "model.mcore_path",
        "data.drop_wrong_traces",
        "data.fields.verifier",
        "rollout.journal",
        "rollout.servers.extra_args",
        "grading.verifier",
        "grading.by_source.a",
        "grading.fail_truncated",
        "objective.alpha",
        "objective.sft_steps",
        "objective.rl_only_steps",
        "optimizer.warmup_steps",
        "eval.sets.a.path",
        "probe.every",
        "profile.steps",
        "checkpoint.every",
        "logging.tensorboard",
        "logging.wandb",
        "export.hf",
    } | {f"eval.sets.a.{field.name}" for field in dataclasses.fields(type(before.eval.sets["a"]))}


def test_the_smoke_run_has_one_step_a_folder_of_its_own_and_dummy_servers() -> None:
    config = smoke_config(real(smoke=True))
    assert (config.run.dir, config.run.steps) == ("runs/a/smoke", 1)
    assert config.rollout.servers.extra_args == ("--ep-size", "2", "--load-format", "dummy")
    assert (config.grading.verifier, config.grading.workers) == (VERIFIER, 7)
    assert config.profile.steps == (1,)
    assert config.parallel == real().parallel


@pytest.mark.parametrize("size", [4, 8])
def test_about_half_of_all_responses_are_right_so_that_most_groups_are_mid(size: int) -> None:
    verdicts = [judge(f"response {number}", "7") for number in range(40 * size)]
    groups = [verdicts[start : start + size] for start in range(0, len(verdicts), size)]
    assert sum(len(set(group)) == 2 for group in groups) > 30
    assert judge("same", "a") == judge("same", "b")
