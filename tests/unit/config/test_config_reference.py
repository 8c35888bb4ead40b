"""The configuration reference: the page and the output of ``config`` have every key, its type and its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.config.reading.load import dump_config, load_config, parse_config
from megatron_dypo.config.reference import REQUIRED, find, sections, to_markdown, to_text

ROOT = Path(__file__).parents[3]
KEYS = [key for section in sections() for key in section.keys]
SMALLEST: dict[str, dict[str, Any]] = {"model": {"hf_path": "m"}, "data": {"prompts": ["p"]}}
WITH_SET = {**SMALLEST, "eval": {"sets": {"NAME": {"path": "p"}}}}
"""NAME stands for the names of a mapping."""


def leaves(node: object, path: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [path]
    return [leaf for key, value in node.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]


def test_the_reference_has_every_key_of_a_config_once() -> None:
    config = yaml.safe_load(dump_config(parse_config(WITH_SET, where="test")))
    assert sorted(key.path for key in KEYS) == sorted([*leaves(config), "eval.sets"])


def value_of(config: object, path: str) -> object:
    for part in path.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def without(tree: dict[str, Any], path: str) -> dict[str, Any]:
    name, _, rest = path.partition(".")
    return {key: without(value, rest) if key == name else value for key, value in tree.items() if rest or key != name}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_a_key_has_a_meaning_and_the_default_of_the_config(key) -> None:
    assert len(key.text) > 10
    assert "``" not in key.text
    assert key.text.endswith((".", ")"))
    if not key.is_required:
        config = parse_config(WITH_SET if ".NAME." in key.path else SMALLEST, where="test")
        assert value_of(config, key.path) == key.default


@pytest.mark.parametrize("path", REQUIRED)
def test_a_required_key_that_is_left_out_is_an_error_that_names_it(path: str) -> None:
    section, name = path.split(".")[0], path.split(".")[-1]
    with pytest.raises(ValueError, match=rf"{section}.*{name}"):
        parse_config(without(WITH_SET, path), where="test")


def test_every_section_says_what_it_is() -> None:
    assert [section.path for section in sections() if not section.text] == []


def test_the_page_is_the_one_that_the_command_writes() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == to_markdown(), "run: python -m megatron_dypo.config.reference > docs/configuration.md"


def test_a_section_comes_with_those_below_it_and_a_key_alone() -> None:
    assert [section.path for section in find("rollout")] == ["rollout", "rollout.servers"]
    (section,) = find("rollout.servers.port")
    assert [key.path for key in section.keys] == ["rollout.servers.port"]
    assert to_text((section,)).splitlines()[0] == "  rollout.servers.port  (integer; default 30000)"


@pytest.mark.parametrize(("path", "kind"), [
    ("run.steps", "integer"),
    ("run.seed", "integer"),
    ("optimizer.lr", "number"),
    ("data.shuffle", "true or false"),
    ("model.mcore_path", "text or null"),
    ("rollout.mode", "one of sync, async"),
    ("data.prompts", "list of texts"),
    ("grading.by_source", "mapping"),
    ("objective.importance.token_bounds", "[number, number] or null"),
])  # fmt: skip
def test_types_are_named_in_words(path: str, kind: str) -> None:
    assert find(path)[0].keys[0].kind == kind


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    done = CliRunner().invoke(app, ["config", "rollout.grup_size"])
    assert done.exit_code == 65
    assert "rollout.grup_size: no such section or key; did you mean rollout.group_size?" in done.output


def test_the_command_prints_all_sections_without_a_name() -> None:
    done = CliRunner().invoke(app, ["config"])
    assert done.exit_code == 0
    assert [key.path for key in KEYS if f"  {key.path}  (" not in done.output] == []


@pytest.mark.parametrize("task", ["math", "choice", "exact", "own", "sft"])
@pytest.mark.parametrize("more", [[], ["--all"]], ids=["short", "all"])
def test_init_writes_a_config_that_loads_and_comments_each_key(task: str, more: list[str], tmp_path: Path) -> None:
    path = tmp_path / "configs" / "dypo.yaml"
    done = CliRunner().invoke(app, ["init", str(path), "--task", task, *more])
    assert done.exit_code == 0, done.output
    config = load_config(path)
    assert config.objective.name == ("sft" if task == "sft" else "dypo")
    text = path.read_text(encoding="utf-8")
    if more:
        ours = [key.path for key in KEYS if ".NAME." not in key.path]
        assert [path for path in ours if f"{path.rpartition('.')[2]}: " not in text] == []
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        if re.match(r" +\w+: ", line):
            assert re.match(r" +# \S", above), f"{line} has no comment"


def test_every_default_that_init_lists_can_be_uncommented(tmp_path: Path) -> None:
    path = tmp_path / "dypo.yaml"
    CliRunner().invoke(app, ["init", str(path), "--all"])
    kept, names = [], [section.path.rpartition(".")[2] for section in sections()]
    for line in path.read_text(encoding="utf-8").splitlines():
        word = line.strip().removeprefix("# ")
        is_key = any(word.startswith(f"{key.path.rpartition('.')[2]}: ") for key in KEYS)
        is_section = word.endswith(":") and word[:-1] in names
        kept.append(line.replace("# ", "", 1) if is_key or is_section else line)
    path.write_text("\n".join(kept), encoding="utf-8")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    paths = [key.path for key in KEYS if ".NAME." not in key.path and key.path != "eval.sets"]
    assert sorted(leaves(tree)) == sorted([*paths, "eval.sets.held_out.path"])
    load_config(path)


def test_init_replaces_no_file_unless_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "dypo.yaml"
    path.write_text("mine", encoding="utf-8")
    done = CliRunner().invoke(app, ["init", str(path)])
    assert done.exit_code == 65
    assert "exists already" in done.output
    assert path.read_text(encoding="utf-8") == "mine"
    assert CliRunner().invoke(app, ["init", str(path), "--overwrite"]).exit_code == 0
    load_config(path)
