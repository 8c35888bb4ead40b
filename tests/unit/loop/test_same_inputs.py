"""The inputs that a checkpoint stores, and their comparison with those of the run that resumes from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.run import RunConfig
from megatron_dypo.data.prompts import PromptStream, open_prompts
from megatron_dypo.loop.setup.inputs import (
    DECIDING_DATA,
    OTHER_DATA,
    Inputs,
    describe_inputs,
    describe_version,
    warn_of_unseen_code,
)
from megatron_dypo.loop.setup.open_data import open_tokenizer
from megatron_dypo.loop.setup.same_inputs import require_same_inputs
from megatron_dypo.models.architecture import load_architecture
from tests.support.e2e.parity_task import write_task

PARTS: tuple[Any, ...] = ("data", "seed", "tokenizer", "model", "reference", "teacher", "verifier", "version")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    file = folder / "train.jsonl"
    rows = [json.loads(line) | {"source": "parity", "verifier": "exact"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def describe(task: Path, *overrides: str, teacher: str | None = "big-model") -> Inputs:
    """Return the inputs of the task's run, with a reference of one file."""
    config = load_config(task / "config.yaml", list(overrides))
    arch = load_architecture(Path(config.model.hf_path))
    tokenizer = open_tokenizer(config, arch.vocab_size)
    dataset = open_prompts(config.data.prompts, config.data, tokenizer)
    return describe_inputs(
        config,
        stream=PromptStream(dataset, tokenizer, config.data, config.run.seed),
        tokenizer=tokenizer,
        arch=arch,
        reference={"model.safetensors": "ab"},
        teacher=teacher,
        version=describe_version(),
    )


def refusal(stored: Any, current: Inputs, *allowed: str) -> str:
    try:
        require_same_inputs(Path("run"), stored, current, allowed)
    except ValueError as error:
        return str(error)
    return ""


def test_every_field_of_the_data_counts_or_says_where_it_counts() -> None:
    assert sorted([*DECIDING_DATA, *OTHER_DATA]) == sorted(field.name for field in dataclasses.fields(DataConfig))


def test_every_column_counts(task: Path) -> None:
    columns = {key.removeprefix("fields.") for key in describe(task)["data"] if key.startswith("fields.")}
    assert columns == {field.name for field in dataclasses.fields(DataFieldsConfig)}


def test_every_part_may_be_allowed_by_its_name(task: Path) -> None:
    assert tuple(describe(task)) == PARTS
    assert RunConfig(dir="run", allow_changed=PARTS).allow_changed == PARTS


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.fields.answer=id", 'data.fields.answer: "answer" → "id"'),
        ('data.fields.id=""', 'data.fields.id: "id" → ""'),
        ("data.fields.traces=[]", 'data.fields.traces: ["traces"] → []; data.teachers: ["long", "short"] → []'),
        ("data.max_trace_tokens=4", "data.max_trace_tokens: 8192 → 4"),
        ("data.max_prompt_tokens=5", "data.max_prompt_tokens: 1024 → 5"),
        ("data.teachers=[short]", 'data.teachers: ["long", "short"] → ["short"]'),
        ("data.drop_wrong_traces=true", "data.drop_wrong_traces: false → true"),
        ("data.shuffle=false", "data.shuffle: true → false"),
    ],
)
def test_another_choice_from_the_same_files_is_refused_with_both_values(task: Path, override: str, words: str) -> None:
    stored, current = describe(task), describe(task, override)
    assert f"data: {words}: draws mean other prompts, answers or traces" in refusal(stored, current)
    assert refusal(stored, current, "data") == ""


def test_the_same_choice_in_other_words_is_no_change(task: Path) -> None:
    other = describe(
        task,
        "data.format=deepmath",
        "data.fields={prompt: prompt, answer: answer, traces: traces, id: id, verifier: verifier, source: source}",
        "data.teachers=[long, short]",
        "data.on_bad_row=skip",
        "data.keep_row=true",
    )
    assert refusal(describe(task), other) == ""


def test_other_libraries_and_other_code_are_refused_with_both_versions(task: Path) -> None:
    stored, current = describe(task), describe(task)
    stored["version"] |= {"torch": "1.0", "transformer-engine": "2.9", "code of megatron_dypo": "a1b2"}
    current["version"] |= {"torch": "2.0", "transformer-engine": None, "code of megatron_dypo": "c3d4"}
    error = refusal(stored, current)
    assert 'code of megatron_dypo: "a1b2" → "c3d4"' in error
    assert 'torch: "1.0" → "2.0"' in error
    assert 'transformer-engine: "2.9" → nothing' in error
    assert refusal(stored, current, "version") == ""


def test_another_model_of_the_teachers_servers_is_refused_and_none_is_no_change(task: Path) -> None:
    stored = describe(task)
    error = refusal(stored, describe(task, teacher="small-model"))
    assert 'teacher: teacher_servers.model: "big-model" → "small-model": the same rollout has other log-probs' in error
    assert refusal(stored, describe(task, teacher="small-model"), "teacher") == ""
    assert refusal(stored, describe(task, teacher=None)) == refusal(describe(task, teacher=None), stored) == ""


def test_what_an_earlier_version_did_not_store_is_not_compared_and_named_in_one_line(
    task: Path, caplog: pytest.LogCaptureFixture
) -> None:
    current = describe(task)
    stored = copy.deepcopy(current)
    del stored["teacher"]
    stored["version"] = current["version"]["megatron-dypo"]
    stored["data"] = {name: current["data"][name] for name in ("files", "shuffle")}
    code = "code of tests.support.e2e.parity_task"
    stored["verifier"] = {key: value for key, value in current["verifier"].items() if key != code}
    stored["verifier"]["tests.support.e2e.parity_task:verify"] = "the digest of one file"
    with caplog.at_level(logging.WARNING):
        assert refusal(stored, current) == ""
    (record,) = caplog.records
    for name in ("data.fields.answer", "teacher_servers.model", code, "torch", "code of megatron_dypo"):
        assert name in record.getMessage()
    assert "data.shuffle: true → false" in refusal(stored, describe(task, "data.shuffle=false"))
    stored["version"] = "0.0.9"
    assert 'version: megatron-dypo: "0.0.9" → "' in refusal(stored, current)


def test_a_checkpoint_of_this_version_lacks_nothing(task: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert refusal(describe(task, teacher=None), describe(task, teacher=None)) == ""
    assert not caplog.records


def test_a_verifier_whose_code_is_not_found_is_named(task: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_unseen_code(describe(task, "grading.verifier=no_such_package.judge:verify"))
    (record,) = caplog.records
    assert "code of no_such_package.judge" in record.getMessage()
    caplog.clear()
    warn_of_unseen_code(describe(task))
    assert not caplog.records
