"""Turn the published files of evaluation sets into prompt files. Nothing is downloaded.

python tools/prepare_data.py list
python tools/prepare_data.py make math500 downloads/math500_test.jsonl data/math500.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command("list")
def list_sets() -> None:
    """Show each set: where to get its file, its licence, its columns, its size."""
    from megatron_dypo.eval.benchmarks.sets import listing

    typer.echo(listing())


@app.command("make")
def make(
    name: Annotated[str, typer.Argument(metavar="SET", help="Name of the set, as `list` shows it.")],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Published file: .jsonl, .parquet, .json or .csv.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL file to write.")],
    instruction: Annotated[
        str, typer.Option(help="Text behind each prompt, such as: Put your final answer within \\boxed{}.")
    ] = "",
    part: Annotated[bool, typer.Option("--part", help="Accept a file with another number of rows.")] = False,
) -> None:
    """Write the rows of a published file as a prompt file.

    Exit status 65: the file cannot be used.
    """
    from megatron_dypo.eval.benchmarks.prepare import prepare_set

    count = prepare_set(name, path, out, instruction=instruction, is_part=part)
    typer.echo(f"{out}: {count} rows of {name}")


def run() -> None:
    """Run the program; print a user's mistake as one line, and exit with status 65."""
    from megatron_dypo.ending import Cause

    try:
        app()
    except ValueError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        sys.exit(Cause.BAD_INPUT.status)


if __name__ == "__main__":
    run()
