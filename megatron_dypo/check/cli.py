"""``megatron-dypo check``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import AsJson, ConfigFile, Overrides, user_errors


def check(
    config: ConfigFile,
    overrides: Overrides = None,
    judge_all: Annotated[bool, typer.Option("--all", help="Judge every trace instead of 200 of each teacher.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check all inputs of a run: rows, lengths, first prompt, tokenizer, traces, verifiers, contamination.

    Trains nothing and starts no server. Exit status 65: `train` would refuse to start.
    """
    from megatron_dypo.check.report import to_data, to_text
    from megatron_dypo.check.survey import survey
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.ending import Cause

    with user_errors():
        resolved = load_config(config, overrides or [])
    found = survey(resolved, judge_all=judge_all)
    typer.echo(json.dumps(to_data(found), indent=2) if as_json else to_text(found))
    if found.problems:
        raise typer.Exit(Cause.BAD_INPUT.status)
