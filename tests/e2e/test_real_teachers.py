"""Teachers on real servers, SGLang's and another: traces that they write, their log-probs, and their tokenizers."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.rollout.teacher.check import require_same_tokenizer
from megatron_dypo.rollout.teacher.client import TeacherClient
from megatron_dypo.rollout.teacher.logprobs import teacher_logprobs
from megatron_dypo.types import Sample, SampleKind, Treatment
from tests.support.e2e.commands import REPOSITORY, finished, start, steps_of, wait_until
from tests.support.e2e.openai_server import OpenAIServer, openai_server
from tests.support.e2e.parity_task import verify, write_task
from tests.support.e2e.transformers_server import transformers_server
from tests.support.e2e.waiting import Oracle, groups_in
from tests.support.hf_models import make_hf_model, save_tokenizer
from tests.support.present import present
from tests.support.tiny_tokenizers import train_bpe
from tests.support.tool_commands import TOOLS
from tests.support.trace_cases import read_lines, records

pytestmark = pytest.mark.slow

MAX_GAP = 1e-4
SAMPLES, KEEP, MAX_TOKENS = 6, 2, 48
STOPS = list(range(100, 131))
"""Many ids, so that a random model ends most of its responses."""


@pytest.fixture(scope="module")
def has_lines(path: Path, count: int) -> bool:
    return path.is_file() and path.read_bytes().count(b"\n") >= count


def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen3", tmp_path_factory.mktemp("models") / "teacher", seed=7)


@pytest.fixture(scope="module")
def server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIServer]:
    with openai_server(model_path, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def other_server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_server(model_path, tmp_path_factory.mktemp("server") / "serve.log") as url:
        yield url


# Traces


def write_prompts(folder: Path, count: int) -> Path:
    """Write rows of the parity task without traces."""
    draw = random.Random(3)
    rows = [
        {"id": f"p{i}", "prompt": f"t{3 + i} t{draw.randrange(3, 100)}", "answer": str(i % 2), "level": i}
        for i in range(count)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "in.jsonl"


def start_tool(folder: Path, teacher: dict[str, Any], key: str | None = None, **grading: Any) -> subprocess.Popen[str]:
    """Start ``tools/generate_traces.py`` from ``in.jsonl`` to ``out.jsonl``."""
    tree = {
        "teachers": {
            "t": {"api": "completions", "temperature": 1.0, "top_p": 1.0, "max_tokens": MAX_TOKENS, **teacher}
        },
        "grading": {"verifier": "tests.support.e2e.parity_task:verify", "workers": 1, **grading},
    }
    (folder / "teachers.yaml").write_text(json.dumps(tree))
    arguments = [folder / "in.jsonl", folder / "out.jsonl", "--teachers", folder / "teachers.yaml"]
    return subprocess.Popen(
        [sys.executable, *map(str, (TOOLS / "generate_traces.py", *arguments))],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **({"TEACHER_KEY": key} if key else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def of_sglang(server: OpenAIServer, model_path: Path) -> dict[str, Any]:
    return {
        "urls": [server.url],
        "model": str(model_path),
        "api_key_env": "TEACHER_KEY",
        "max_in_flight": 2,
        "samples": SAMPLES,
        "keep": KEEP,
        "extra": {"stop_token_ids": STOPS},
    }


def different(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "out.jsonl.records" / "report.json").read_text())
    return report


def test_traces_of_a_real_server_are_its_right_responses_however_often_the_tool_is_ended(
    server: OpenAIServer, model_path: Path, tmp_path: Path
) -> None:
    rows = read_lines(write_prompts(tmp_path, 24))
    lines = tmp_path / "out.jsonl.records" / "t.jsonl"
    teacher, kept = of_sglang(server, model_path), list[dict[str, Any]]()
    for number, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        process = start_tool(tmp_path, teacher, server.api_key)
        enough = len(kept) + 6
        wait_until(process, functools.partial(has_lines, lines, enough))
        process.send_signal(number)
        output = finished(process, status)
        if number == signal.SIGTERM:
            assert f"{len(records(tmp_path / 'out.jsonl', 't'))} responses are recorded" in output
        assert records(tmp_path / "out.jsonl", "t")[: len(kept)] == kept, "what was recorded stays"
        kept = records(tmp_path / "out.jsonl", "t")
        assert not (tmp_path / "out.jsonl").exists()
    output = finished(start_tool(tmp_path, teacher, server.api_key))
    found = records(tmp_path / "out.jsonl", "t")
    assert found[: len(kept)] == kept
    assert len({(record["key"], record["sample"]) for record in found}) == len(found), "nothing is asked twice"

    answers = {row["id"]: row["answer"] for row in rows}
    for record in found:
        assert record["truncated"] == (record["num_tokens"] == MAX_TOKENS)
        assert record["correct"] == (not record["truncated"] and verify(record["response"], answers[record["id"]]))
        assert record["num_prompt_tokens"] == 2
    for row, made in zip(rows, read_lines(tmp_path / "out.jsonl"), strict=True):
        own = sorted((r for r in found if r["id"] == row["id"]), key=lambda record: record["sample"])
        right = different([record["response"] for record in own if record["correct"]])
        traces = made.get("traces", {})
        assert different(list(traces.values())) == right[:KEEP]
        assert list(traces) == ["t", "t#2"][: len(traces)]
        assert len(own) == SAMPLES or len(right) == KEEP, "asked until enough are right"
        assert {name: made[name] for name in row} == row
    counts = Counter((record["correct"], record["truncated"]) for record in found)
    report = report_of(tmp_path)
    assert report["teachers"]["t"]["asked"] == len(found)
    assert report["teachers"]["t"]["right"] == counts[True, False] > 0
    assert report["teachers"]["t"]["wrong"] == counts[False, False] > 0
    assert report["teachers"]["t"]["truncated"] == counts[False, True]
    assert f"{report['prompts_with_trace']} of 24 different prompts have a trace" in output


def test_a_teacher_that_is_never_right_gives_rows_without_traces_and_says_so(
    server: OpenAIServer, model_path: Path, tmp_path: Path
) -> None:
    rows = read_lines(write_prompts(tmp_path, 3))
    teacher = {**of_sglang(server, model_path), "samples": 2, "keep": 1}
    output = finished(start_tool(tmp_path, teacher, server.api_key, verifier="exact"))
    assert "0 of 3 different prompts have a trace" in output
    assert "6 responses asked, 0 right (0.0%)" in output
    assert [{name: row[name] for name in rows[0]} for row in read_lines(tmp_path / "out.jsonl")] == rows
    assert not any("traces" in row for row in read_lines(tmp_path / "out.jsonl"))
    assert report_of(tmp_path)["teachers"]["t"]["prompts_left"] == 0


def test_a_real_server_that_refuses_the_key_or_serves_another_model_is_named_before_anything_is_asked(
    server: OpenAIServer, model_path: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, 2)
    refused = finished(start_tool(tmp_path, of_sglang(server, model_path), "another-key"), 65)
    assert f"teachers.t: {server.url}/v1 refuses the API key: set TEACHER_KEY" in refused
    teacher = {**of_sglang(server, model_path), "model": "another"}
    assert f"model='another': {server.url}/v1 serves {model_path}" in finished(
        start_tool(tmp_path, teacher, server.api_key), 65
    )
    assert not (tmp_path / "out.jsonl").exists()
    assert records(tmp_path / "out.jsonl", "t") == []


def test_a_server_of_another_kind_writes_traces_too(other_server: str, model_path: Path, tmp_path: Path) -> None:
    rows = read_lines(write_prompts(tmp_path, 6))
    teacher = {"urls": [other_server], "model": str(model_path), "samples": 4, "max_in_flight": 2, "max_tokens": 400}
    finished(start_tool(tmp_path, teacher))
    found, answers = records(tmp_path / "out.jsonl", "t"), {row["id"]: row["answer"] for row in rows}
    assert any(record["correct"] for record in found)
    for record in found:
        assert record["correct"] == (not record["truncated"] and verify(record["response"], answers[record["id"]]))
        assert 0 < record["num_tokens"] <= 400
    right = {record["id"] for record in found if record["correct"]}
    assert {row["id"] for row in read_lines(tmp_path / "out.jsonl") if row.get("traces")} == right


# Log-probs and tokenizers


def teacher_config(url: str, model: Path | None = None) -> TeacherServersConfig:
    api: dict[str, Any] = {} if model is None else {"api": "openai", "model": str(model)}
    return TeacherServersConfig(urls=(url,), request_deadline_s=120.0, retries=0, **api)


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_log_probs_by_either_api_of_a_real_server_are_those_of_transformers(
    api: str, server: OpenAIServer, model_path: Path
) -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            order=order,
            member=0,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=np.append(rng.integers(3, 131, 5 + order), 130).astype(np.int32),
            num_prompt_tokens=1 + order,
            policy_version=0,
        )
        for order in range(6)
    ]
    cfg = teacher_config(server.url, model_path if api == "openai" else None)
    found = teacher_logprobs(samples, TeacherClient(cfg, server.api_key, vocab_size=131), progress=False)
    oracle = Oracle(model_path)
    for sample, logp in zip(samples, found, strict=True):
        assert isinstance(logp, np.ndarray), logp
        expected, _ = oracle.score(sample.tokens, sample.num_prompt_tokens)
        np.testing.assert_allclose(logp, expected, rtol=0, atol=MAX_GAP)


def policies(folder: Path) -> dict[str, Path]:
    """Write tokenizers that differ from the server's: in a text's ids, and by words at the vocabulary's end."""
    train_bpe(folder / "bpe")
    save_tokenizer(folder / "larger", 140)
    return {"has ids": folder / "bpe", "the policy's last token, 139, is": folder / "larger"}


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_a_real_server_with_another_tokenizer_is_refused_and_both_are_named(
    api: str, server: OpenAIServer, model_path: Path, tmp_path: Path
) -> None:
    cfg = teacher_config(server.url, model_path if api == "openai" else None)
    require_same_tokenizer(cfg, server.api_key, load_tokenizer(model_path), policy=str(model_path))
    for words, policy in policies(tmp_path).items():
        with pytest.raises(ValueError, match="must have the policy's tokenizer") as caught:
            require_same_tokenizer(cfg, server.api_key, load_tokenizer(policy), policy=str(policy))
        for part in (words, f"urls={server.url!r}, which serves {model_path}:", f"that of model.hf_path={policy}:"):
            assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"/tokenize refuses the API key: set DYPO_TEACHER_API_KEY"):
        require_same_tokenizer(cfg, "another-key", load_tokenizer(model_path), policy="")


def test_a_server_that_cannot_be_compared_is_refused(other_server: str, model_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/tokenize does not answer as SGLang and vLLM do: HTTP 404"):
        require_same_tokenizer(
            teacher_config(other_server, model_path), None, load_tokenizer(model_path), policy=str(model_path)
        )


def test_a_run_learns_from_a_real_teachers_log_probs_and_refuses_one_with_another_tokenizer(
    server: OpenAIServer, model_path: Path, tmp_path: Path
) -> None:
    config = write_task(
        tmp_path,
        objective={"name": "opd"},
        batching={"prompts_per_update": 4, "updates_per_batch": 2},
        teacher_servers={"urls": [server.url]},
    )
    finished(start("train", config, DYPO_TEACHER_API_KEY=server.api_key))
    groups, oracle = groups_in(tmp_path / "run" / "checkpoints" / "step_000001"), Oracle(model_path)
    assert len(groups) == 4
    gaps = []
    for sample in (sample for group in groups for sample in group):
        expected, _ = oracle.score(sample.tokens, sample.num_prompt_tokens)
        np.testing.assert_allclose(present(sample.teacher_logp), expected, rtol=0, atol=MAX_GAP)
        gaps += (present(sample.old_logp) - expected).tolist()
    assert steps_of(tmp_path / "run")[2]["train/opd_reverse_kl"] == pytest.approx(np.mean(gaps), abs=MAX_GAP)

    make_hf_model("qwen3", tmp_path / "model", vocab_size=140)
    output = finished(start("train", config, f"run.dir={tmp_path / 'other'}", DYPO_TEACHER_API_KEY=server.api_key), 65)
    assert f"which serves {model_path}: the teacher must have the policy's tokenizer" in output
    assert f"that of model.hf_path={tmp_path / 'model'}: the policy's last token, 139, is" in output
    assert not steps_of(tmp_path / "other")
