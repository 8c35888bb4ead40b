"""A smoke run as a user starts it: real ranks, a real SGLang server, and no weights; with a profile and options."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.support.e2e.commands import start, steps_of, train
from tests.support.e2e.parity_task import write_task

OPTIONS = ("model.megatron.moe_per_layer_logging=true", "optimizer.megatron.log_num_zeros_in_grad=true")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task whose model folder has a configuration and a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("smoke")
    config = write_task(
        folder,
        run={"steps": 5},
        parallel={"pipeline": 2},
        eval={"sets": {"held_out": {"path": str(folder / "held_out.jsonl")}}},
        profile={"steps": [1, 4], "ranks": [1]},
        rollout={"servers": {"max_total_tokens": 2000}},
    )
    (folder / "model" / "model.safetensors").unlink()
    return config


@pytest.fixture(scope="module")
def smoked(config: Path) -> tuple[Path, str]:
    """Make the smoke run; return its folder and its output."""
    return config.parent / "run" / "smoke", train(config, "run.smoke=true", *OPTIONS)


def test_a_smoke_run_needs_no_weights_and_says_in_one_line_what_the_step_took(smoked: tuple[Path, str]) -> None:
    folder, output = smoked
    (line,) = [line for line in output.splitlines() if "smoke run: " in line]
    assert re.search(
        r"one step with random weights was made by 2 ranks: rollouts \d+\.\d s, log π_old \d+\.\d s, .*update "
        r"\d+\.\d s, refit \d+\.\d s, whole step \d+\.\d s; [1-9][\d,]* tokens in the update; "
        r"peak memory \d+\.\d GiB, on rank [01]$",
        line,
    )
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["cause"], status["step"], status["steps"]) == ("ended", "done", 1, 1)


def test_the_step_is_a_real_one_with_rollouts_of_the_random_weights(smoked: tuple[Path, str]) -> None:
    (metrics,) = steps_of(smoked[0]).values()
    assert metrics["rollout/num_rollouts"] > 0
    assert metrics["gate/mid"] > 0
    assert metrics["train/grad_norm"] > 0
    assert metrics["refit/bytes"] > 0
    assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-3, "the server samples from the trainer's weights"


def test_nothing_of_it_is_taken_for_the_real_run(smoked: tuple[Path, str], config: Path) -> None:
    folder, _ = smoked
    assert [path.name for path in folder.parent.iterdir()] == ["smoke"]
    assert not (folder / "checkpoints").exists() or not list((folder / "checkpoints").iterdir())
    assert not (folder / "hf").exists()
    refused = train(config, status=65)
    assert "no *.safetensors there" in refused


def test_the_profiled_rank_writes_its_step(smoked: tuple[Path, str]) -> None:
    profile = smoked[0] / "profile"
    assert [path.name for path in profile.iterdir()] == ["step_1_rank_1.json.gz"]
    with gzip.open(profile / "step_1_rank_1.json.gz", "rt", encoding="utf-8") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert names >= {"step 1", "old_log_prob", "update_actor", "forward_backward", "optimizer_step", "refit"}


def test_options_of_megatron_are_in_the_run_folder(smoked: tuple[Path, str]) -> None:
    written = yaml.safe_load((smoked[0] / "config.yaml").read_text())
    assert written["model"]["megatron"] == {"moe_per_layer_logging": True}
    assert written["optimizer"]["megatron"] == {"log_num_zeros_in_grad": True}


def test_an_option_that_cannot_be_is_refused_in_one_line_before_anything_starts(config: Path, tmp_path: Path) -> None:
    overrides = ("run.smoke=true", f"run.dir={tmp_path / 'none'}", "model.megatron.moe_deepep_num_sm=3")
    process = start("train", config, *overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 65, output
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert "model.megatron.moe_deepep_num_sm=3: TransformerConfig of megatron-core" in line
    assert line.endswith("has no such field; did you mean model.megatron.moe_deepep_num_sms?")
    assert not (tmp_path / "none").exists()
