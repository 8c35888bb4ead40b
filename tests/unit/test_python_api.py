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
from tests.unit.report.run_folder import make_run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")
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
    """A model folder with a tokenizer, a prompt file and a run, under the names that the page uses."""
    place = tmp_path_factory.mktemp("python_api")
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from model import write_model
    from task import Addition, write_problems

    sys.path.remove(str(ROOT / "examples" / "quickstart"))
    write_model(place / "model", seed=1)
    write_problems(place / "train.jsonl", [Addition(478, 964), Addition(112, 134)])
    make_run(place / "runs" / "math", num_steps=3)
    return place


def examples() -> list[str]:
    blocks = re.findall(r"(<!-- not run.*?-->\n)?```python\n(.*?)```", PAGE, flags=re.DOTALL)
    return [code for skipped, code in blocks if not skipped]


def test_the_page_has_examples_and_leaves_out_only_the_run() -> None:
    assert len(examples()) == 3
    assert PAGE.count("```python") == 4


@pytest.mark.parametrize("code", examples(), ids=["one group", "prompt files", "a run"])
def test_an_example_of_the_page_runs(code: str, folder: Path) -> None:
    # As a script of a user: the check of the data runs in processes that import it.
    assert run_python(f"if __name__ == '__main__':\n    exec({code!r})", folder) or "assert" in code


def test_training_without_its_other_ranks_is_refused_and_says_how_to_start_them() -> None:
    config = megatron_dypo.load_config(ROOT / "examples" / "quickstart" / "dypo.yaml")
    with pytest.raises(ValueError, match="needs 2 ranks: start them with torchrun --nproc-per-node=2"):
        megatron_dypo.train_rank(config)


def test_training_without_its_inputs_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = megatron_dypo.load_config(
        ROOT / "examples" / "quickstart" / "dypo.yaml", ["parallel.pipeline=1", f"model.hf_path={tmp_path}"]
    )
    with pytest.raises(ValueError, match=r"no config\.json there"):
        megatron_dypo.train_rank(config)
