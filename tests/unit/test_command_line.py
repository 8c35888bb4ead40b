"""The command line as a whole: version, completion, and no heavy import before a command runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import megatron_dypo
from megatron_dypo.cli import app
from megatron_dypo.config.cli import Task
from megatron_dypo.config.reading.starter import TASKS

COMMANDS = sorted(typer.main.get_group(app).commands)


def test_the_version_is_that_of_the_package() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output.strip() == f"megatron-dypo {megatron_dypo.__version__}"


def test_the_tasks_of_init_are_those_that_have_a_config() -> None:
    assert [task.value for task in Task] == list(TASKS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_every_option_says_what_it_does(command: str) -> None:
    parsed = typer.main.get_group(app).commands[command]
    assert parsed.help
    assert [parameter.name for parameter in parsed.params if not vars(parameter)["help"]] == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom megatron_dypo.cli import app\n"
        f"for command in {COMMANDS}:\n    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'megatron', 'sglang', 'transformers', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_completion_that_names_the_program(shell: str) -> None:
    code = (
        "import sys; from megatron_dypo.cli import app; sys.argv[0] = 'megatron-dypo'; app(prog_name='megatron-dypo')"
    )
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "--show-completion", shell],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "_MEGATRON_DYPO_COMPLETE" in done.stdout
