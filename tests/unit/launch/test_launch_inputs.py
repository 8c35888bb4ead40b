"""Dry runs, and all starts of runs, report on the inputs."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_dypo.check.inputs import check_inputs
from megatron_dypo.cli import app
from megatron_dypo.launch import start
from tests.support.check_cases import case, rows, write_case, write_rows

MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "sliding_window": 128,
}


def lengths(prompt: int, response: int, trace: int) -> dict[str, Any]:
    return {
        "data": {"max_prompt_tokens": prompt, "max_trace_tokens": trace},
        "rollout": {"max_new_tokens": response},
    }


def test_a_sound_config_is_accepted_without_a_word(tmp_path: Path) -> None:
    found = check_inputs(case(tmp_path))
    assert (found.problems, found.missing, found.notes) == ([], [], [])
    assert not (tmp_path / "run").exists()


def test_options_that_megatron_lacks_are_problems_of_the_config(tmp_path: Path) -> None:
    config = case(tmp_path, parallel={"megatron": {"bucket_size": 7, "buckets_size": 7}})
    (problem,) = check_inputs(config).problems
    assert problem.startswith("parallel.megatron.buckets_size=7: DistributedDataParallelConfig of megatron-core ")


def test_a_smoke_run_misses_no_weights(tmp_path: Path) -> None:
    config = case(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert len(check_inputs(config).missing) == 1
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, smoke=True))
    assert (check_inputs(config).problems, check_inputs(config).missing) == ([], [])


def test_sequences_that_fit_a_sliding_window_are_accepted(tmp_path: Path) -> None:
    assert check_inputs(case(tmp_path, model=MISTRAL, **lengths(64, 64, 64))).problems == []


GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}


def test_experts_in_mxfp4_are_refused_where_servers_would_be_refitted(tmp_path: Path) -> None:
    assert check_inputs(case(tmp_path, model=GPT_OSS, **lengths(64, 65, 65))).problems == []
    published = {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}
    (problem,) = check_inputs(case(tmp_path, model=published)).problems
    assert "servers would serve it with experts in MXFP4 (quantization_config of its config.json), which no" in problem
    alone = case(tmp_path, model=published, objective={"name": "sft"}, eval={"sets": {}})
    assert check_inputs(alone).problems == []


COPIES = ["--attn-dp-size", "2"]
QWEN3 = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8}
QWEN3 |= {"num_key_value_heads": 8, "intermediate_size": 96, "max_position_embeddings": 512}


@pytest.mark.parametrize("transport", ["auto", "p2p", "broadcast"])
@pytest.mark.parametrize(
    ("model", "tensor", "extra", "words"),
    [
        ("llama", 2, COPIES, "server attn_dp_size=2: must be 1 for a llama model: SGLang splits its attention over"),
        ("qwen3", 3, COPIES, "server attn_dp_size=2: does not divide server tensor=3"),
        ("qwen3", 2, ["--moe-dense-tp-size=1"], "server moe_dense_tp_size=1: must be left out for a qwen3 model"),
    ],
)
def test_servers_that_could_not_serve_the_model_are_refused_before_they_start(
    model: str, tensor: int, extra: list[str], words: str, transport: str, tmp_path: Path
) -> None:
    servers = {"tensor_parallel": tensor, "extra_args": extra}
    published = {**QWEN3, "model_type": model}
    config = case(tmp_path, model=published, rollout={"servers": servers}, refit={"transport": transport})
    (problem,) = check_inputs(config).problems
    assert words in problem
    assert "\n" not in problem


def test_only_planned_refits_need_parts_that_suit_the_ranks(tmp_path: Path) -> None:
    """The heads need to suit the ranks of one copy of attention."""

    def problems(tensor: int, transport: str) -> list[str]:
        servers = {"servers": {"tensor_parallel": tensor, "extra_args": COPIES}}
        return check_inputs(case(tmp_path, model=QWEN3, rollout=servers, refit={"transport": transport})).problems

    assert problems(16, "p2p") == problems(16, "auto") == problems(32, "broadcast") == []
    rule = "server tensor / attn_dp_size=16: does not divide num_attention_heads=8"
    assert [rule in problem for problem in problems(32, "p2p")] == [True]


@pytest.mark.parametrize(("response", "trace"), [(65, 20), (20, 65)])
def test_a_sliding_window_that_cuts_responses_or_traces_is_refused(response: int, trace: int, tmp_path: Path) -> None:
    (problem,) = check_inputs(case(tmp_path, model=MISTRAL, **lengths(64, response, trace))).problems
    assert "data.max_trace_tokens = 129: must not exceed sliding_window=128" in problem


def test_files_that_are_not_there_are_missing_each_by_its_key(tmp_path: Path) -> None:
    config = case(tmp_path, data={"prompts": ["absent.jsonl"]}, eval={"sets": {"aime": {"path": "none.jsonl"}}})
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).unlink()
    found = check_inputs(config)
    assert found.problems == found.notes == []
    assert found.missing == [
        "data.prompts='absent.jsonl': no such file",
        "eval.sets.aime.path='none.jsonl': no such file",
        f"model.hf_path={config.model.hf_path!r}: no tokenizer.json and no tokenizer.model there",
        f"model.hf_path={config.model.hf_path!r}: no *.safetensors there, which a plan does without",
    ]
    assert found.refused(dry_run=True, strict=False) == []
    assert found.refused(dry_run=True, strict=True) == found.refused(dry_run=False, strict=False) == found.missing


@pytest.mark.parametrize(
    ("content", "words"), [(b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"), (b"x" * 100, "")]
)
def test_weights_that_are_none_are_refused_by_their_file(content: bytes, words: str, tmp_path: Path) -> None:
    config = case(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(content)
    (problem,) = check_inputs(config).problems
    assert problem.startswith(str(path))
    assert words in problem


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(tmp_path: Path) -> None:
    (problem,) = check_inputs(case(tmp_path, model={"vocab_size": 256})).problems
    assert "config.json: vocab_size=256: the tokenizer has ids up to" in problem


@pytest.mark.parametrize(
    ("verifier", "words"),
    [("no_such_module:verify", "no_such_module"), ("tests.support.check_cases:no_such_function", "no_such_function")],
)
def test_a_verifier_that_does_not_import_is_refused(verifier: str, words: str, tmp_path: Path) -> None:
    (problem,) = check_inputs(case(tmp_path, grading={"verifier": verifier})).problems
    assert problem.startswith(f"grading.verifier={verifier!r}: ")
    assert words in problem


def test_a_file_that_was_cut_off_is_refused_with_its_last_line(tmp_path: Path) -> None:
    config = case(tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    (problem,) = check_inputs(config).problems
    assert f"{path}:40: is not JSON" in problem
    assert "it may have been cut off" in problem


def test_prompts_that_are_all_too_long_are_refused_with_the_count(tmp_path: Path) -> None:
    (problem,) = check_inputs(case(tmp_path, data={"max_prompt_tokens": 1}, eval={"sets": {}})).problems
    assert problem.startswith("40 of 40 prompts are longer than data.max_prompt_tokens=1: the shortest has ")


def test_prompts_of_which_some_are_too_long_are_noted_with_the_count(tmp_path: Path) -> None:
    config = case(tmp_path, data={"max_prompt_tokens": 70})
    long = {"prompt": "long " * 20, "answer": "1"}
    write_rows(tmp_path / "train.jsonl", [*rows(3), long])
    found = check_inputs(config)
    assert found.problems == []
    assert any(note.startswith("1 of 4 prompts are longer than data.max_prompt_tokens=70") for note in found.notes)


def test_a_teacher_that_no_row_has_is_refused_with_those_that_they_have(tmp_path: Path) -> None:
    (problem,) = check_inputs(case(tmp_path, data={"teachers": ["r1"]})).problems
    assert problem == "data.teachers=['r1']: no row has a trace of theirs; the data's teachers are careful, hasty"


def test_an_answer_that_the_verifier_cannot_take_is_refused_with_its_row(tmp_path: Path) -> None:
    config = case(tmp_path)
    write_rows(tmp_path / "train.jsonl", [*rows(2), {"prompt": "?", "answer": {"value": 3}}])
    (problem,) = check_inputs(config).problems
    assert f"{tmp_path / 'train.jsonl'}:3: answer=" in problem


@pytest.mark.parametrize(
    ("keys", "row", "problem"),
    [
        ({}, {"verifier": "os:system"}, "eval.sets.aime: verifier='os:system': a row may name "),
        ({}, {"answer": {"value": 3}}, "eval.sets.aime: FOLDER/held_out.jsonl:1: answer={'value': 3}: "),
        (
            {},
            {"answer": None},
            "eval.sets.aime: 1 bad row in the prompt files:\n  FOLDER/held_out.jsonl:1: answer=None: ",
        ),
        (
            {"shuffle_options": True},
            {},
            "eval.sets.aime: FOLDER/held_out.jsonl: prompt held_out.jsonl:1: shuffle_options",
        ),
        ({"verifier": "no_such:f"}, {}, "eval.sets.aime.verifier='no_such:f': cannot import no_such"),
    ],
)
def test_an_evaluation_set_that_its_verifier_cannot_judge_is_refused_with_its_key(
    keys: dict[str, Any], row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    config = case(tmp_path, eval={"sets": {"aime": {"path": str(tmp_path / "held_out.jsonl"), **keys}}})
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": "?", "answer": "1", **row}])
    (found,) = check_inputs(config).problems
    assert found.replace(str(tmp_path), "FOLDER").startswith(problem)


def test_a_source_of_the_config_that_no_row_has_is_noted(tmp_path: Path) -> None:
    (note,) = check_inputs(case(tmp_path, grading={"by_source": {"gsm": "exact"}})).notes
    assert note == "grading.by_source.gsm: no row has this source; the data's sources are sums"


def test_responses_longer_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    config = case(tmp_path, model={"max_position_embeddings": 4096}, rollout={"max_new_tokens": 8192})
    (problem,) = check_inputs(config).problems
    assert problem.startswith("rollout.max_new_tokens=8192: must be below max_position_embeddings=4096 of ")


@pytest.mark.parametrize("argument", ["--context-length=256", "--context-length 256", "--context-len=256"])
def test_a_context_length_among_the_servers_arguments_is_their_limit(argument: str, tmp_path: Path) -> None:
    config = case(tmp_path, rollout={"max_new_tokens": 250, "servers": {"extra_args": [argument]}})
    found = check_inputs(config)
    assert found.problems == []
    assert any("exceeds --context-length 256 of rollout.servers.extra_args" in note for note in found.notes)


@pytest.mark.parametrize(("tokens", "is_noted"), [(130, True), (3000, False)])
def test_a_cache_that_holds_no_whole_sequence_is_noted(tokens: int, is_noted: bool, tmp_path: Path) -> None:
    config = case(tmp_path, rollout={"max_new_tokens": 100, "servers": {"max_total_tokens": tokens}})
    notes = check_inputs(config).notes
    assert any("SGLang truncates responses when its KV cache is full" in note for note in notes) == is_noted


def test_servers_of_others_may_have_another_limit_which_is_only_noted(tmp_path: Path) -> None:
    config = case(tmp_path, rollout={"max_new_tokens": 600, "servers": {"urls": ["http://a:1"]}})
    found = check_inputs(config)
    assert found.problems == []
    assert any("exceeds max_position_embeddings=512" in note for note in found.notes)


def test_traces_beyond_the_models_positions_are_noted_by_their_real_length(tmp_path: Path) -> None:
    config = case(tmp_path, model={"max_position_embeddings": 120}, rollout={"max_new_tokens": 8})
    assert check_inputs(config).notes == [], "the limits' sum is 300, the rows are short"
    write_rows(tmp_path / "train.jsonl", [{**row, "traces": {"careful": "x " * 45}} for row in rows(4)])
    (note,) = check_inputs(config).notes
    assert "the longest trace (91 tokens)" in note or "the longest trace (90 tokens)" in note
    assert "exceeds max_position_embeddings=120" in note


def test_a_run_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    config = case(tmp_path, run={"dir": str(tmp_path / "train.jsonl" / "run")})
    (problem,) = check_inputs(config).problems
    assert problem.startswith(f"run.dir={config.run.dir!r}: {tmp_path / 'train.jsonl'} is a file")


def test_a_run_that_must_not_resume_is_told_of_checkpoints(tmp_path: Path) -> None:
    config = case(tmp_path, run={"resume": False})
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    (note,) = check_inputs(config).notes
    assert note.startswith(f"run.resume=false: {tmp_path / 'run' / 'checkpoints'} has checkpoints")


def test_an_interpreter_for_servers_that_is_not_there_is_missing(tmp_path: Path) -> None:
    config = case(tmp_path, rollout={"servers": {"python": "/no/python"}})
    assert check_inputs(config).missing == ["rollout.servers.python='/no/python': no such program"]


def test_a_run_that_asks_no_server_has_no_limits_of_servers(tmp_path: Path) -> None:
    servers = {"python": "/no/python", "max_total_tokens": 10}
    config = case(
        tmp_path,
        rollout={"max_new_tokens": 9000, "servers": servers},
        objective={"name": "sft"},
        eval={"sets": {}},
    )
    found = check_inputs(config)
    assert (found.problems, found.missing, found.notes) == ([], [], [])


def test_a_disk_without_room_for_the_checkpoints_is_noted_with_both_sizes(tmp_path: Path) -> None:
    huge = {"hidden_size": 2**16, "num_hidden_layers": 4000, "intermediate_size": 2**18}
    config = case(tmp_path, model=huge, checkpoint={"every": 1, "keep": 0}, run={"steps": 100})
    (note,) = check_inputs(config).notes
    assert "GiB are free on its disk, and the run needs about" in note
    assert "100 checkpoints of" in note


def test_every_problem_is_said_at_once(tmp_path: Path) -> None:
    config = case(tmp_path, grading={"verifier": "no_such_module:verify"}, objective={"name": "dpo"})
    (tmp_path / "train.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    words = ("objective.name='dpo'", "is a git-lfs pointer: run `git lfs pull`", "no_such_module")
    problems = check_inputs(config).problems
    assert len(problems) == len(words)
    assert all(any(word in problem for problem in problems) for word in words)


def test_a_start_refuses_problems_returns_what_is_missing_and_logs_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = case(tmp_path, grading={"by_source": {"gsm": "exact"}}, eval={"sets": {"aime": {"path": "none.jsonl"}}})
    assert start.check_inputs(config) == ["eval.sets.aime.path='none.jsonl': no such file"]
    assert "grading.by_source.gsm: no row has this source" in caplog.text
    path = tmp_path / "train.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"train\.jsonl:40: is not JSON"):
        start.check_inputs(config)


@pytest.mark.parametrize(
    ("options", "status"), [(["--dry-run"], 0), (["--dry-run", "--strict"], 1), (["--dry-run", "run.dir=f/run"], 1)]
)
def test_a_dry_run_prints_the_config_and_notes_unless_it_refuses(
    options: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").touch()
    path = write_case(tmp_path, grading={"by_source": {"gsm": "exact"}})
    result = CliRunner().invoke(app, ["train", str(path), *options])
    assert result.exit_code == status
    if status == 0:
        assert "verifier: exact" in result.stdout
        assert "note: grading.by_source.gsm: no row has this source" in result.stderr
    else:
        assert isinstance(result.exception, ValueError)
        assert ("run.dir='f/run'" if "run.dir=f/run" in options else "grading.by_source.gsm") in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_ranks_other_than_the_first_open_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = case(tmp_path, grading={"verifier": "no_such_module:verify"})
    monkeypatch.setenv("RANK", "1")
    assert check_inputs(config).problems == []


class TestLargeFiles:
    """Files of which only both ends are read."""

    def large(self, folder: Path, **changes: Any) -> Path:
        found = [{**row, "answer": str(index), "id": str(index)} for index, row in enumerate(rows(1) * 15_000)]
        for index, row in changes.items():
            found[int(index.removeprefix("row"))] = row
        return write_rows(folder / "train.jsonl", found)

    def test_a_sound_one_is_accepted_in_time(self, tmp_path: Path) -> None:
        config = case(tmp_path)
        path = self.large(tmp_path)
        assert path.stat().st_size > 2**21
        start = time.process_time()
        assert check_inputs(config).problems == []
        assert time.process_time() - start < 5

    @pytest.mark.parametrize(
        ("row", "place"), [("row2", ":3"), ("row14999", ": the last row"), ("row14990", ": row 10 from the end")]
    )
    def test_a_bad_row_at_either_end_is_found(self, row: str, place: str, tmp_path: Path) -> None:
        config = case(tmp_path)
        path = self.large(tmp_path, **{row: {"question": "?", "answer": "1"}})
        (problem,) = check_inputs(config).problems
        assert problem == f"{path}{place}: prompt: is missing (the row has question, answer)"

    def test_a_file_that_was_cut_off_is_refused(self, tmp_path: Path) -> None:
        config = case(tmp_path)
        path = self.large(tmp_path)
        path.write_bytes(path.read_bytes()[:-30])
        (problem,) = check_inputs(config).problems
        assert problem.startswith(f"{path}: the last row: is not JSON")
        assert "it may have been cut off" in problem

    def test_a_long_last_line_is_read_whole(self, tmp_path: Path) -> None:
        config = case(tmp_path)
        path = self.large(tmp_path)
        with path.open("a") as file:
            file.write(json.dumps({"prompt": "?" * 3 * 2**20, "answer": []}) + "\n")
        (problem,) = check_inputs(config).problems
        assert problem.startswith(f"{path}: the last row: answer=[]")

    def test_prompts_that_are_all_too_long_are_noted(self, tmp_path: Path) -> None:
        config = case(tmp_path, data={"max_prompt_tokens": 1}, eval={"sets": {}})
        path = self.large(tmp_path)
        (note,) = check_inputs(config).notes
        assert note.startswith(f"{path}: each of the 16 prompts looked at is longer than data.max_prompt_tokens=1")

    def test_names_of_the_config_that_no_row_has_are_noted(self, tmp_path: Path) -> None:
        config = case(tmp_path, data={"teachers": ["r1"], "fields": {"id": "uid"}})
        self.large(tmp_path)
        column, teacher = check_inputs(config).notes
        assert column == "data.fields.id=uid: no row at the ends of the prompt files has such a field"
        assert teacher.endswith("has a trace of theirs; the teachers there are careful, hasty")

    def test_the_first_rows_of_a_parquet_file_are_read(self, tmp_path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "train.parquet"
        config = case(tmp_path, data={"prompts": [str(path)]})
        texts = [f"{index} " * 300 for index in range(20_000)]
        table = pyarrow.table({"prompt": ["?", "", *texts], "answer": ["1", "2", *texts]})
        pyarrow.parquet.write_table(table, path, compression="none")
        (problem,) = check_inputs(config).problems
        assert problem == f"{path}:2: prompt='': must not be empty"
        path.write_bytes(path.read_bytes()[:-100])
        (problem,) = check_inputs(config).problems
        assert problem.startswith(f"{path}: is not a Parquet file")


def test_settings_of_an_evaluation_without_a_set_are_noted(tmp_path: Path) -> None:
    notes = check_inputs(case(tmp_path, eval={"sets": {}, "every": 5, "samples_per_prompt": 2})).notes
    assert "eval.every=5: does nothing: eval.sets names no set" in notes
    assert "eval.samples_per_prompt=2: does nothing: eval.sets names no set" in notes


@pytest.mark.parametrize(
    ("objective", "is_refused"),
    [({"name": "sft"}, True), ({"name": "sft_then_rl", "sft_steps": 1}, True), ({"name": "grpo"}, False)],
)
def test_an_objective_that_begins_with_traces_needs_one(
    objective: dict[str, Any], is_refused: bool, tmp_path: Path
) -> None:
    problems = check_inputs(case(tmp_path, objective=objective, data={"fields": {"traces": ""}})).problems
    words = "begins with teachers' traces, and no row of the prompt files has one"
    assert problems == ([f"objective.name={objective['name']}: {words}"] if is_refused else [])
