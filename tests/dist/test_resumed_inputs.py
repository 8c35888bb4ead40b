"""A run goes on only under the inputs that it began with: each other one is refused by name, or allowed by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.data.tokenizer.open import load_tokenizer
from tests.support.dist.spawn import join_world, run_ranks
from tests.support.e2e.parity_task import write_task
from tests.support.fake_sglang import FakeSGLang, Reply
from tests.support.fake_teacher import answer
from tests.support.slow import slow_unless

Change = Callable[[Path], Mapping[str, str]]
"""Changes files in the folder of a task; returns overrides of the config."""


def rank_begin(path: str, overrides: Sequence[str] = ()) -> None:
    """Save the checkpoint of a run that begins."""
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.loop.megatron_policy import MegatronPolicy
    from megatron_dypo.loop.resume import save_checkpoint
    from megatron_dypo.loop.setup.build import open_run

    with open_run(load_config(path, list(overrides))) as run:
        assert isinstance(run.policy, MegatronPolicy)
        run.policy.optimizer.zero_grad()
        run.policy.optimizer.step()  # only then it has a state
        save_checkpoint(run.checkpointer, run.progress)


def rank_go_on(path: str, overrides: list[str], code: str) -> str:
    """Open the run of the checkpoint with this program, or as if its code had another digest; return the error, if
    there is one."""
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.loop.setup import inputs
    from megatron_dypo.loop.setup.build import open_run

    if code:
        inputs.__dict__["digest_of_program"] = lambda: code
    try:
        with open_run(load_config(path, overrides)):
            return ""
    except ValueError as error:
        return str(error)


def rank_hash(model: str) -> dict[str, str]:
    from megatron_dypo.config.model import ModelConfig
    from megatron_dypo.loop.setup.reference_files import hash_reference

    join_world()
    return hash_reference(ModelConfig(hf_path=model))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task whose run has a checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    with FakeSGLang() as server:
        config = write_task(folder, rollout={"servers": {"urls": [server.url]}})
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        other = [row | {"other": str(1 - int(row["answer"]))} for row in rows]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
        run_ranks(1, rank_begin, str(config))
    return folder


def go_on(folder: Path, *overrides: str, code: str = "") -> str:
    with FakeSGLang() as server:
        servers = f"rollout.servers.urls=[{server.url}]"
        (error,) = run_ranks(1, rank_go_on, str(folder / "config.yaml"), [servers, *overrides], code)
    return str(error)


def another_answer(folder: Path) -> Mapping[str, str]:
    file = folder / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[7]["answer"] = str(1 - int(rows[7]["answer"]))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def fewer_rows(folder: Path) -> Mapping[str, str]:
    file = folder / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    return {}


def another_tokenizer(folder: Path) -> Mapping[str, str]:
    file = folder / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["t5"], vocabulary["t6"] = vocabulary["t6"], vocabulary["t5"]
    file.write_text(json.dumps(content))
    return {}


def another_template(folder: Path) -> Mapping[str, str]:
    file = folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "{{ messages }}"}))
    return {}


def another_rope(folder: Path) -> Mapping[str, str]:
    file = folder / "model" / "config.json"
    content = json.loads(file.read_text())
    content.pop("rope_parameters", None)
    file.write_text(json.dumps(content | {"rope_theta": 12345.0}))
    return {}


def one_weight(folder: Path) -> Mapping[str, str]:
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += torch.finfo(torch.float32).eps
    save_file(weights, file, metadata={"format": "pt"})
    return {}


def another_seed(_: Path) -> Mapping[str, str]:
    return {"run.seed": "7"}


def another_verifier(_: Path) -> Mapping[str, str]:
    return {"grading.verifier": "tests.support.e2e.parity_task:approve"}


IN_EVERY_RUN = (another_answer, another_seed, another_tokenizer, another_rope, one_weight, another_verifier)
"""A change of each part; the others are left to the slow tests."""


@pytest.mark.parametrize(
    ("part", "change", "words"),
    slow_unless(
        lambda case: case[1] in IN_EVERY_RUN,
        [
            ("data", another_answer, "train.jsonl: has the same number of rows (48) with another content"),
            ("data", fewer_rows, "train.jsonl: had 48 rows, has 47"),
            ("data", lambda _: {"data.shuffle": "false"}, "data.shuffle: true → false"),
            ("data", lambda _: {"data.fields.answer": "other"}, 'data.fields.answer: "answer" → "other"'),
            ("data", lambda _: {"data.max_prompt_tokens": "4"}, "data.max_prompt_tokens: 1024 → 4"),
            ("data", lambda _: {"data.teachers": "[long]"}, 'data.teachers: ["long", "short"] → ["long"]'),
            ("data", lambda _: {"data.drop_wrong_traces": "true"}, "data.drop_wrong_traces: false → true"),
            ("seed", another_seed, "run.seed: 1 → 7"),
            ("tokenizer", another_tokenizer, 'tokenizer: tokenizer.json: "'),
            ("tokenizer", lambda _: {"rollout.stop_token_ids": "[129]"}, "ids that end a response: ["),
            ("tokenizer", another_template, 'tokenizer: tokenizer_config.json: "'),
            ("model", another_rope, "→ 12345.0"),
            ("reference", one_weight, 'reference: model.safetensors: "'),
            ("verifier", another_verifier, "parity_task:approve"),
            ("verifier", lambda _: {"grading.fail_truncated": "true"}, "grading.fail_truncated: false → true"),
        ],
    ),
)
def test_another_input_is_refused_with_its_name_or_allowed_by_it(
    task: Path, part: str, change: Change, words: str
) -> None:
    before = {path: path.read_bytes() for path in (task / "train.jsonl", *(task / "model").iterdir())}
    try:
        overrides = [f"{key}={value}" for key, value in change(task).items()]
        error = go_on(task, *overrides)
        allowed = go_on(task, *overrides, f"run.allow_changed=[{part}]")
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    assert f"{part}: " in error
    assert words in error
    assert f"run.allow_changed=[{part}]" in error
    assert allowed == ""


def test_other_code_of_the_program_is_refused_or_allowed_by_name(task: Path) -> None:
    error = go_on(task, code="c3d4")
    assert 'version: code of megatron_dypo: "' in error
    assert '" → "c3d4": this program may compute' in error
    assert go_on(task, "run.allow_changed=[version]", code="c3d4") == ""


def test_another_model_on_the_teachers_servers_is_refused(tmp_path: Path) -> None:
    config = write_task(tmp_path, objective={"name": "opd"})
    tokenizer: Any = load_tokenizer(tmp_path / "model", chat_template=False)

    def plan(_: int, body: dict[str, Any]) -> Reply:
        return answer(body, tokenizer)

    with FakeSGLang() as server, FakeSGLang(plan, models=("/models/big",)) as teacher:
        servers = [f"rollout.servers.urls=[{server.url}]", f"teacher_servers.urls=[{teacher.url}]"]
        run_ranks(1, rank_begin, str(config), servers)
    with FakeSGLang(plan, models=("/elsewhere/big",)) as teacher:
        assert go_on(tmp_path, f"teacher_servers.urls=[{teacher.url}]") == ""
    with FakeSGLang(plan, models=("/models/small",)) as teacher:
        error = go_on(tmp_path, f"teacher_servers.urls=[{teacher.url}]")
    assert 'teacher: teacher_servers.model: "big" → "small"' in error


def test_a_refused_resume_leaves_the_records_of_the_run_as_they_are(task: Path) -> None:
    run = task / "run"
    (run / "samples").mkdir(exist_ok=True)
    for step in (0, 1, 2):
        (run / "samples" / f"step_{step:06d}.jsonl").write_text("{}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}\n')
    (run / "versions.json").write_text("{}\n")
    files = [run / name for name in ("metrics.jsonl", "versions.json", "config.yaml")]
    before = {path: path.read_bytes() for path in (*files, *(run / "samples").iterdir())}
    assert "run.seed: 1 → 7" in go_on(task, "run.seed=7")
    assert {path: path.read_bytes() for path in before} == before
    assert go_on(task, "run.seed=7", "run.allow_changed=[seed]") == ""
    assert [path.name for path in (run / "samples").iterdir()] == ["step_000000.jsonl"]
    for file in files:
        assert file.read_bytes() != before[file], f"{file.name}: the refused start would not have changed it"


def test_the_same_inputs_elsewhere_and_faster_grading_are_no_change(task: Path) -> None:
    (task / "model").rename(task / "moved")
    (task / "data").mkdir()
    (task / "train.jsonl").rename(task / "data" / "train.jsonl")
    moved = f"model.hf_path={task / 'moved'}", f"data.prompts=[{task / 'data' / 'train.jsonl'}]"
    spelled = "data.fields.answer=answer", "data.teachers=[short,long]", "data.on_bad_row=skip", "data.keep_row=true"
    try:
        assert go_on(task, *moved, *spelled, "grading.workers=1", "optimizer.lr=1e-5") == ""
    finally:
        (task / "moved").rename(task / "model")
        (task / "data" / "train.jsonl").rename(task / "train.jsonl")
        (task / "data").rmdir()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_ranks_share_the_files_of_a_reference_and_all_get_every_checksum(tmp_path: Path, num_ranks: int) -> None:
    folder, weight_map = tmp_path / "model", {}
    folder.mkdir()
    for number in range(5):
        name = f"model-{number}.safetensors"
        save_file({f"weight.{number}": torch.full((3,), float(number))}, folder / name)
        weight_map[f"weight.{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "other.txt").write_text("not read")
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    assert run_ranks(num_ranks, rank_hash, str(folder)) == [expected] * num_ranks
