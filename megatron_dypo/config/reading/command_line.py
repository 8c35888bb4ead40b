"""Arguments that several commands share, and how a command answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.ending import Cause

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; `megatron-dypo config` explains its keys.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Quantization(str, Enum):
    """The FP8 formats of linear weights."""

    NONE = "none"
    BLOCK = "fp8_block"
    CHANNEL = "fp8_channel"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError, which is a user's mistake, into one line on standard error and exit status 65."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"megatron-dypo: error: {error}", err=True)
        raise typer.Exit(Cause.BAD_INPUT.status) from error
