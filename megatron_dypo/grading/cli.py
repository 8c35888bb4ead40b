"""``megatron-dypo grade``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import AsJson, user_errors


def grade(
    file: Annotated[Path, typer.Argument(help="JSONL or Parquet file with a row for each response.")],
    verifier: Annotated[str, typer.Option(help="As grading.verifier: math, exact, choice or pkg.module:function.")],
    field_response: Annotated[str, typer.Option(help="Column with the response.")] = "response",
    field_answer: Annotated[str, typer.Option(help="Column with the gold answer.")] = "answer",
    expected: Annotated[
        str | None,
        typer.Option(
            help="Column that says whether the response is correct; disagreements are shown.",
            show_default="expected, where a row has it",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="As grading.workers.")] = 2,
    deadline_s: Annotated[float, typer.Option(help="As grading.deadline_s.")] = 10.0,
    show: Annotated[int, typer.Option(min=0, help="Disagreements and reasons to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Run a verifier over a file of responses, in the same processes as in a run, and count its verdicts.

    Exit status 65: the file, a row of it or the verifier cannot be used; 12: no response got a verdict.
    """
    from megatron_dypo.config.grading import GradingConfig
    from megatron_dypo.ending import Cause
    from megatron_dypo.grading.command import grade_file, to_data, to_text
    from megatron_dypo.grading.pair_file import Fields

    with user_errors():
        cfg = GradingConfig(verifier=verifier, workers=workers, deadline_s=deadline_s)
        fields = Fields(
            response=field_response,
            answer=field_answer,
            expected=expected or "expected",
            needs_expected=expected is not None,
        )
        summary = grade_file(cfg, file, fields, show=show)
    typer.echo(json.dumps(to_data(summary), indent=2) if as_json else to_text(summary))
    if summary.no_verdict == summary.rows:
        raise typer.Exit(Cause.NO_VERDICTS.status)
