"""The chains of calls in docs/architecture.md name functions that exist, and are short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LINK = re.compile(r"^(\d+)\. `([\w/]+\.py)`: `(\w+)`$", re.MULTILINE)


def chains() -> list[list[tuple[str, str]]]:
    """Return the chains of the page: (file, function) of each link, the caller first."""
    found: list[list[tuple[str, str]]] = []
    for number, file, function in LINK.findall(PAGE):
        found += [[]] if number == "1" else []
        found[-1].append((file, function))
    return found


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "megatron_dypo" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_a_request_is_six_calls_from_the_step_and_a_refits_first_byte_eight() -> None:
    assert [len(chain) - 1 for chain in chains()] == [6, 8]


def test_every_link_of_a_chain_is_a_function_of_its_file() -> None:
    for file, function in (link for chain in chains() for link in chain):
        assert function in functions_of(file), f"{file}: {function}"
