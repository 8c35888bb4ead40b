"""The functions of the loop get the parts that they use, and not the run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import megatron_dypo

LOOP = Path(megatron_dypo.__file__).parent / "loop"
ALLOWED = {("train.py", "train_run"), ("smoke.py", "smoke")}
"""The loop, and that of one step. ``open_run`` builds a run and ``restore_batch`` restores one; neither takes a run."""


def functions_that_take_a_run(source: str) -> set[str]:
    """Return the names of all functions and methods with an argument whose annotation names ``Run``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        names = (n.id for a in arguments if a.annotation for n in ast.walk(a.annotation) if isinstance(n, ast.Name))
        if "Run" in names or any(a.arg == "run" for a in arguments):
            found.add(node.name)
    return found


def test_only_the_loop_itself_takes_the_whole_run() -> None:
    found = {(path.name, name) for path in LOOP.rglob("*.py") for name in functions_that_take_a_run(path.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize("arguments", ["run: Run", "x: int, *, of: Run | None = None", "run", "runs: list[Run]"])
def test_an_argument_that_is_a_run_is_found(arguments: str) -> None:
    assert functions_that_take_a_run(f"def f({arguments}): ...") == {"f"}
    assert functions_that_take_a_run("def f(run_dir: Path) -> Run: ...") == set()
