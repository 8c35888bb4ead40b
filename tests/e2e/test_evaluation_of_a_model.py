"""``megatron-dypo eval`` of the quickstart's model on a real SGLang. Killed and started again, it ends with the figures
of an uninterrupted evaluation, by every API, and for every folder of a run that the model may be in."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.eval.records import Record, read_records, records_path
from tests.support.e2e.commands import finished, start, steps_of, train, wait_until
from tests.support.e2e.openai_server import OpenAIServer, openai_server
from tests.support.examples import load_example

ITEMS = 40
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that returns the prompt unchanged, so that every API of the server gets the same tokens."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the quickstart's model with random weights."""
    (model,) = load_example("quickstart", "model")
    folder: Path = tmp_path_factory.mktemp("models") / "quickstart"
    model.write_model(folder, 1)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIServer]:
    with openai_server(model_path, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a sets file with additions of the quickstart's task."""
    folder = tmp_path_factory.mktemp("sets")
    (task,) = load_example("quickstart", "task")
    task.write_problems(folder / "heldout.jsonl", task.draw_problems({0: ITEMS // 2, 1: ITEMS // 2}, random.Random(1)))
    tree = {
        "dtype": "float32",
        "data": {"chat_template": False},
        "rollout": {"max_new_tokens": 24, "max_in_flight": 1},
        "grading": {"verifier": "exact", "workers": 1},
        # Greedy, since responses are compared and SGLang on a CPU accepts no seed of a request.
        "eval": {"temperature": 0, "sets": {"heldout": {"path": str(folder / "heldout.jsonl")}}},
    }
    (folder / "sets.yaml").write_text(json.dumps(tree))
    return folder / "sets.yaml"


def records(out: Path) -> list[Record]:
    return read_records(records_path(out, "heldout"))


def by_item(out: Path) -> dict[tuple[str, int], Record]:
    return {(record.item, record.sample): record for record in records(out)}


def summary(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text())["sets"]


def start_eval(*arguments: object, key: str | None = None) -> subprocess.Popen[str]:
    """Start an evaluation; ``key``: the key of the given servers."""
    if key is None:
        return start("eval", *arguments)
    return start("eval", *arguments, DYPO_SGLANG_API_KEY=key)


def kill_after_some(out: Path, *arguments: object, key: str | None = None) -> list[Record]:
    """Start an evaluation, kill all its processes once it has three records, and return its records."""
    killed = start_eval(*arguments, "--out", out, key=key)
    wait_until(killed, lambda: len(records(out)) >= 3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    kept = records(out)
    assert 3 <= len(kept) < ITEMS
    assert not (out / "summary.json").exists()
    return kept


def test_a_killed_evaluation_goes_on_to_the_same_figures(
    server: OpenAIServer, model_path: Path, sets: Path, tmp_path: Path
) -> None:
    arguments = (model_path, "--sets", sets, "--url", server.url)
    key = server.api_key
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kept = kill_after_some(cut, *arguments, key=key)
    output = finished(start_eval(*arguments, "--out", cut, key=key))
    assert f"{len(kept)} of {ITEMS} responses have a record" in output
    assert records(cut)[: len(kept)] == kept
    finished(start_eval(*arguments, "--out", whole, key=key))
    assert records(cut) == records(whole)
    assert summary(cut) == summary(whole)


@pytest.mark.slow
def test_every_api_of_a_server_gives_the_same_responses(
    server: OpenAIServer, model_path: Path, sets: Path, tmp_path: Path
) -> None:
    key = server.api_key
    apis: dict[str, list[object]] = {
        "sglang": [],
        "chat": ["--api", "chat"],
        "ids": ["--api", "completions", "--tokenizer", model_path],
        "text": ["--api", "completions"],
    }
    for name, options in apis.items():
        url = server.url if name == "sglang" else f"{server.url}/v1"
        finished(start_eval(model_path, "--sets", sets, "--out", tmp_path / name, "--url", url, *options, key=key))
    expected = by_item(tmp_path / "sglang")
    assert len(expected) == ITEMS
    assert len({record.response for record in expected.values()}) > ITEMS / 4, "greedy responses differ by prompt"
    for name in apis:
        assert by_item(tmp_path / name) == expected, name
        assert summary(tmp_path / name) == summary(tmp_path / "sglang"), name
    wrong = start_eval(
        "other", "--sets", sets, "--out", tmp_path / "wrong", "--url", server.url, "--api", "chat", key=key
    )
    assert f"model='other': {server.url}/v1 serves {model_path}" in finished(wrong, 65)
    refused = start_eval(model_path, "--sets", sets, "--out", tmp_path / "refused", "--url", server.url)
    assert f"{server.url} refuses the API key: set DYPO_SGLANG_API_KEY" in finished(refused, 65)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_a_checkpoint_and_its_hf_folder_are_one_model_on_servers_of_the_command(
    model_path: Path, sets: Path, tmp_path: Path
) -> None:
    (task,) = load_example("quickstart", "task")
    task.write_problems(tmp_path / "train.jsonl", task.draw_problems({0: 32}, random.Random(2)))
    run = tmp_path / "run"
    config = {
        "run": {"dir": str(run), "steps": 2},
        "model": {"hf_path": str(model_path), "dtype": "float32"},
        "data": {"prompts": [str(tmp_path / "train.jsonl")], "chat_template": False},
        "objective": {"name": "sft"},
        "rollout": {"prompts_per_round": 8},
        "batching": {"prompts_per_update": 8, "tokens_per_microbatch": 512},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 1},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    train(tmp_path / "config.yaml")
    assert sorted(steps_of(run)) == [1, 2]
    models = {"hf": run / "hf", "newest": run, "last": run / "checkpoints" / "step_000002"}
    kept = kill_after_some(tmp_path / "hf", models["hf"], "--sets", sets)
    for name, model in models.items():
        finished(start_eval(model, "--sets", sets, "--out", tmp_path / name))
        assert len(records(tmp_path / name)) == ITEMS
    assert records(tmp_path / "hf")[: len(kept)] == kept
    assert by_item(tmp_path / "newest") == by_item(tmp_path / "last") == by_item(tmp_path / "hf")
    finished(start_eval(run / "checkpoints" / "step_000001", "--sets", sets, "--out", tmp_path / "first"))
    assert by_item(tmp_path / "first") != by_item(tmp_path / "hf"), "another step is another model"
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["step_000001", "step_000002"]
    refused = finished(start_eval(run / "checkpoints" / "step_000001", "--sets", sets, "--out", tmp_path / "hf"), 65)
    assert "its responses are of another setting: model was" in refused
