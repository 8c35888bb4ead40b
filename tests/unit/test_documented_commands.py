"""Every command of the README and the pages: it is run if it needs neither server nor weights, else parsed."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.config.reading.load import load_config
from tests.support.documented_commands import Command, commands_of
from tests.support.run_folder import make_run

ROOT = Path(__file__).parents[2]
TRIED_ELSEWHERE = {"nemo_run", "own_verifier"}
"""Pages whose commands need more than a clone; test_nemo_run_recipes and test_own_verifier_page try them."""
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem not in TRIED_ELSEWHERE),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*/README.md")),
]
COMMANDS = [command for page in PAGES for command in commands_of(page, (ROOT / page).read_text(encoding="utf-8"))]
OURS = typer.main.get_group(app).commands
RUN = {"config", "init", "plan", "plan-refit", "report", "grade"}
"""Commands that run for real, as does ``train --dry-run``. For others the options and the config are checked."""
ENDLESS = "--live"
"""The option of a command that goes on until its run ends; it is parsed only."""
FILE_ENDINGS = {"json", "jsonl", "lock", "py", "safetensors", "yaml"}
"""Endings of file names such as run.lock and model.safetensors, which are not keys."""
FOREIGN = {"hf", "pytest"}
"""Programs of other projects, whose options are not checked."""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a clone with the files that the pages assume: the README's config, finished runs, and responses."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "dypo.yaml").write_text(block, encoding="utf-8")
    for command in COMMANDS:
        if command.words[1:2] == ("report",):
            for run_dir in (word for word in command.words[2:] if not word.startswith("-")):
                make_run(tmp_path / run_dir, num_steps=3)
    (tmp_path / "responses.jsonl").write_text(json.dumps({"response": "\\boxed{4}", "answer": "4"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_ours(name: str, words: tuple[str, ...]) -> None:
    """Run a command of the package, or parse it and its config."""
    assert name in OURS, f"megatron-dypo has no command {name}"
    if any(word.isupper() or word.startswith("[") for word in words):  # a synopsis, with names for values
        known = {option for parameter in OURS[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", " ".join(words))) <= known
        return
    if (name in RUN and ENDLESS not in words) or "--dry-run" in words:
        done = CliRunner().invoke(app, [name, *words])
        assert done.exit_code == 0, done.output
        return
    context = OURS[name].make_context(name, list(words))
    if "config" in context.params:
        load_config(context.params["config"], context.params["overrides"] or [])


def check_script(path: str, words: tuple[str, ...]) -> None:
    """Check that a Python script exists, and knows the given options."""
    source = (ROOT / path).read_text(encoding="utf-8")
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    declared = source if "add_argument" in source or not options else source + _imported(source)
    assert [option for option in options if option not in declared and not _is_typer_option(option, declared)] == []


def _imported(source: str) -> str:
    modules = re.findall(r"from (megatron_dypo[\w.]*) import", source)
    files = [ROOT / f"{module.replace('.', '/')}.py" for module in modules]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.exists())


def _is_typer_option(option: str, source: str) -> bool:
    return re.search(rf"^    {option[2:].replace('-', '_')}: ", source, flags=re.MULTILINE) is not None


def check_job(script: str, overrides: tuple[str, ...]) -> None:
    """Check that a Slurm script exists, and its config accepts the overrides."""
    default = re.search(r"^CONFIG=\$\{CONFIG:-(.*)\}", (ROOT / script).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert default is not None
    load_config(ROOT / default[1], [override for override in overrides if override != "…"])


def check(command: Command) -> None:
    first, *rest = command.words
    words = tuple(rest)
    program = Path(first).name
    if program == "megatron-dypo" and words[0].startswith("-"):  # an option of the program itself
        known = [option for parameter in typer.main.get_command(app).params for option in parameter.opts]
        assert set(words) <= set(known)
    elif program == "megatron-dypo":
        check_ours(words[0], words[1:])
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
    elif program == "python":
        check_script(words[0], words[1:])
    elif program == "sbatch" or first.startswith("slurm/"):
        script = next(index for index, word in enumerate(command.words) if word.startswith("slurm/"))
        check_job(command.words[script], command.words[script + 1 :])
    elif program == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert words[0] in targets
    elif program == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(words))
        declared = (ROOT / "setup.cfg").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} =", declared, flags=re.MULTILINE) for extra in extras)
    else:
        assert program in FOREIGN, f"{command}: no rule for {program}"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_works_in_a_fresh_clone(command: Command, clone: Path) -> None:
    check(command)


def test_the_readme_shows_commands_of_every_kind() -> None:
    shown = {command.words[1] for command in COMMANDS if command.words[0] == "megatron-dypo"}
    assert {"plan", "plan-refit", "train", "report", "check", "grade", "export", "serve", "init", "config"} <= shown
    assert len(COMMANDS) > 25


def test_every_command_is_in_the_readme_or_a_page() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert [name for name in OURS if f"megatron-dypo {name}" not in text] == []


def test_commands_go_over_lines_and_leave_out_comments_prompts_assignments_and_output() -> None:
    page = "```bash\nA=1 make x \\\n  y  # why\n# no\n```\n```console\n$ z\noutput\n```\ntext\n    megatron-dypo plan\n"
    assert [command.words for command in commands_of("p", page)] == [
        ("make", "x", "y"),
        ("z",),
        ("megatron-dypo", "plan"),
    ]


def test_a_config_that_is_shown_is_not_accepted_with_a_wrong_key(clone: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.rl"):
        check(Command("page", 1, ("megatron-dypo", "train", "dypo.yaml", "optimizer.rl=1")))


@pytest.mark.parametrize(
    "words",
    [
        ("megatron-dypo", "plan", "examples/absent/config.yaml"),
        ("megatron-dypo", "tarin", "dypo.yaml"),
        ("megatron-dypo", "--versoin"),
        ("megatron-dypo", "plan", "CONFIG", "--knodes", "8"),
        ("python", "tools/gpu_check.py", "--cpu-smoek"),
        ("make", "quikstart"),
        ("pip", "install", ".[sglagn]"),
        ("frobnicate",),
    ],
)
def test_a_command_that_does_not_work_is_found(words: tuple[str, ...], clone: Path) -> None:
    with pytest.raises(AssertionError):
        check(Command("page", 1, words))


def test_the_config_of_the_readme_is_the_one_that_commands_run_with(clone: Path) -> None:
    assert yaml.safe_load((clone / "dypo.yaml").read_text())["run"]["dir"] == "runs/math"


def _pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


@pytest.mark.parametrize("page", _pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_named_in_a_sentence_exists(page: Path) -> None:
    named = set(re.findall(r"`megatron-dypo ([a-z][a-z-]*)", page.read_text(encoding="utf-8")))
    assert named <= set(OURS)


# docs/nemo_run.md names keys of NeMo-Run, model.section.key: tests/unit/examples/test_nemo_run_recipes.py tries it.
@pytest.mark.parametrize(
    "page",
    [page for page in _pages() if page.name != "nemo_run.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_key_that_is_named_in_a_sentence_exists(page: Path) -> None:
    config = load_config(ROOT / "examples" / "llama3_70b" / "config.yaml")
    sections = "|".join(vars(config))
    named = re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+)(?=[`:= ])", page.read_text(encoding="utf-8"))
    keys = [name for name in named if name.rpartition(".")[2] not in FILE_ENDINGS]
    assert [key for key in keys if not _is_key(config, key)] == []


def _is_key(config: object, key: str) -> bool:
    value = config
    for part in key.split("."):
        if isinstance(value, Mapping):  # a free mapping, such as data.chat_template_args
            return True
        if not is_dataclass(value) or part not in vars(value):
            return False
        value = getattr(value, part)
    return True
