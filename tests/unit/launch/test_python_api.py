"""The public names of the package, and the examples of docs/python_api.md."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_dypo
from tests.support.run_folder import make_run

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")
SUPERVISED = """
run: {dir: runs/sft}
model: {hf_path: model, dtype: float32}
data: {prompts: [train.jsonl], chat_template: false, max_prompt_tokens: 16, max_trace_tokens: 48}
rollout: {prompts_per_round: 2}
objective: {name: sft}
batching: {prompts_per_update: 2, tokens_per_microbatch: 256}
export: {hf: false}
"""
"""A run that needs no server."""
NAMES = [name for name in megatron_dypo.__all__ if name != "__version__"]


def run_python(code: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = "torch|megatron|numpy|sglang|yaml|pydantic|transformers"
    code = f"import sys, megatron_dypo; dir(megatron_dypo); print(*sorted(set({heavy.split('|')}) & set(sys.modules)))"
    assert run_python(code, tmp_path).strip() == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_leads_to_what_is_called_so_and_has_a_docstring(name: str) -> None:
    value = getattr(megatron_dypo, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    assert name in dir(megatron_dypo)


def test_no_public_name_is_a_module_of_the_package() -> None:
    modules = {path.stem for path in (ROOT / "megatron_dypo").iterdir()}
    assert not modules & set(NAMES)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode_config'"):
        _ = megatron_dypo.lode_config


def test_the_page_lists_every_public_name_and_no_other() -> None:
    first_cells = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
    listed = re.findall(r"`(\w+)[`(]", " ".join(first_cells))
    assert sorted(listed) == sorted(megatron_dypo.__all__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model folder with a tokenizer, a prompt file and a run, under the names that the page uses."""
    place = tmp_path_factory.mktemp("python_api")
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from model import write_model
    from task import Addition, write_problems

    sys.path.remove(str(ROOT / "examples" / "quickstart"))
    write_model(place / "model", seed=1)
    write_problems(place / "train.jsonl", [Addition(478, 964), Addition(112, 134)])
    (place / "dypo.yaml").write_text(SUPERVISED, encoding="utf-8")
    make_run(place / "runs" / "math", num_steps=3)
    return place


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("code", examples(), ids=["one group", "prompt files", "a run that is over", "a run"])
def test_an_example_of_the_page_runs(code: str, folder: Path) -> None:
    # Run it as a user's script: the check of the data runs in processes that import it.
    printed = run_python(f"if __name__ == '__main__':\n    exec({code!r})", folder)
    assert printed or "assert" in code
    if "run_training" in code:
        assert printed.startswith("done")
        assert [row["step"] for row in megatron_dypo.read_metrics(folder / "runs" / "sft" / "metrics.jsonl")] == [1, 2]


def test_a_run_without_its_inputs_ends_for_that_cause(tmp_path: Path) -> None:
    overrides = [f"model.hf_path={tmp_path}", f"run.dir={tmp_path}/run"]
    config = megatron_dypo.load_config(ROOT / "examples" / "quickstart" / "dypo.yaml", overrides)
    assert megatron_dypo.run_training(config) is megatron_dypo.Cause.BAD_INPUT


def test_a_status_that_is_no_causes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = megatron_dypo.load_config(ROOT / "examples" / "quickstart" / "dypo.yaml", [f"run.dir={tmp_path}/run"])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with status 1, which is that of no cause"):
        megatron_dypo.run_training(config)
