"""``megatron-dypo init`` and ``megatron-dypo config``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import user_errors


class Task(str, Enum):
    """The tasks of :data:`megatron_dypo.config.reading.starter.TASKS`."""

    MATH = "math"
    CHOICE = "choice"
    EXACT = "exact"
    OWN = "own"
    SFT = "sft"


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")] = Path("dypo.yaml"),
    task: Annotated[Task, typer.Option(help="Kind of task: which verifier and objective.")] = Task.MATH,
    all_keys: Annotated[bool, typer.Option("--all", help="List every key, commented out with its default.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented config for a task, to be filled in."""
    from megatron_dypo.config.reading.starter import starter_config
    from megatron_dypo.fs import replace_file

    with user_errors():
        if path.exists() and not overwrite:
            raise ValueError(f"{path}: exists already; choose another name, or replace it with --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, starter_config(task.value, all_keys=all_keys))
    typer.echo(f"{path}: set model.hf_path and data.prompts, then run `megatron-dypo check {path}`")


def show_config(
    path: Annotated[
        str, typer.Argument(metavar="SECTION", help="A section or a key.", show_default="all sections")
    ] = "",
) -> None:
    """Print the configuration reference: each key with its type, default and meaning."""
    from megatron_dypo.config.reference import find, sections, to_text

    with user_errors():
        typer.echo(to_text(find(path) if path else sections()))
