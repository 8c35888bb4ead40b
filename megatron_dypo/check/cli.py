"""``megatron-dypo check`` and ``megatron-dypo doctor``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from megatron_dypo.check.doctor import Use, Verdict, examine, possible, to_text
from megatron_dypo.check.installed import look
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
    from megatron_dypo.check.report import to_data
    from megatron_dypo.check.report import to_text as report_text
    from megatron_dypo.check.survey import survey
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.ending import Cause

    with user_errors():
        resolved = load_config(config, overrides or [])
    found = survey(resolved, judge_all=judge_all)
    typer.echo(json.dumps(to_data(found), indent=2) if as_json else report_text(found))
    if found.problems:
        raise typer.Exit(Cause.BAD_INPUT.status)


def doctor(
    use: Annotated[
        list[Use] | None, typer.Option("--for", help="A use that must be possible here; may be given twice.")
    ] = None,
) -> None:
    """Print what is installed, whether it works with this package, and what to change.

    Exit status 1: an installed package is wrong, or a use of --for is not possible.
    """
    found = look()
    lines = examine(found)
    uses = possible(found, lines)
    typer.echo(to_text(lines, uses))
    is_wrong = any(line.verdict is Verdict.WRONG for line in lines)
    if is_wrong or any(uses[wanted] for wanted in use or ()):
        raise typer.Exit(1)
