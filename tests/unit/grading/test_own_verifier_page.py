"""The examples of docs/own_verifier.md work as shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.reading.load import parse_config
from megatron_dypo.ending import Cause
from megatron_dypo.grading.workers.results import CORRECTNESS_KEYS, REWARD_KEYS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "own_verifier.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with the page's modules and its file of pairs."""
    folder = tmp_path_factory.mktemp("own_verifier")
    for block in _blocks("python"):
        name, code = block.split("\n", 1)
        (folder / name.removeprefix("# ")).write_text(code, encoding="utf-8")
    (pairs,) = _blocks("json")
    (folder / "pairs.jsonl").write_text(pairs, encoding="utf-8")
    return folder


def _grade(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "megatron_dypo.cli", "grade", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_session_on_the_page_is_what_one_sees(folder: Path) -> None:
    (block,) = _blocks("console")
    first, *expected = block.splitlines()
    command = first.removeprefix("$ megatron-dypo grade ").split()
    assert _grade(folder, *command).splitlines() == expected


@pytest.mark.parametrize(
    ("verifier", "rows"),
    [
        (
            "my_code_rewards:passes_tests",
            [
                {"response": "def f(a):\n    return a + 1", "entry_point": "f", "expected": True},
                {"response": "def f(a):\n    return a + 2", "entry_point": "f", "expected": False},
            ],
        ),
        ("my_judge:judge", [{"response": "so abc", "expected": True}, {"response": "so", "expected": False}]),
        (
            "my_batch:lengths",
            [
                {"response": "abc", "max_characters": 3, "expected": True},
                {"response": "abcd", "max_characters": 3, "expected": False},
            ],
        ),
    ],
)
def test_each_module_on_the_page_judges(folder: Path, verifier: str, rows: list[dict[str, Any]]) -> None:
    answer = "abc" if verifier == "my_judge:judge" else [{"in": [1], "out": 2}]
    file = folder / f"{verifier.partition(':')[0]}.jsonl"
    file.write_text("".join(json.dumps({"answer": answer, **row}) + "\n" for row in rows), encoding="utf-8")
    found = json.loads(_grade(folder, "--verifier", verifier, "--json", file.name))
    assert (found["rows"], found["no_verdict"], found["disagreements"]) == (len(rows), 0, [])


def test_every_config_on_the_page_is_valid() -> None:
    for block in _blocks("yaml"):
        tree = {"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}, **yaml.safe_load(block)}
        parse_config(tree, where="docs/own_verifier.md")


def test_keys_defaults_and_statuses_are_those_of_the_code() -> None:
    for key in (*CORRECTNESS_KEYS, *REWARD_KEYS):
        assert f"`{key}`" in TEXT
    assert f"(default: {GradingConfig().deadline_s:g} s)" in TEXT
    assert f"(default: {GradingConfig().batch_size})" in TEXT
    assert f"exit status {Cause.NO_VERDICTS.status} and the" in TEXT
    assert f"{Cause.BAD_INPUT.status}: the file, a row or the verifier" in TEXT


def test_the_first_example_is_short() -> None:
    assert len(_blocks("python")[0].strip().splitlines()) <= 9
