"""Ask teachers about the prompts of a file, and keep the responses that a verifier finds right as traces.

python tools/generate_traces.py data/math.jsonl data/with_traces.jsonl --teachers teachers.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import AsJson, Overrides


def main(
    prompts: Annotated[Path, typer.Argument(help="JSONL or Parquet file with prompts and answers.")],
    out: Annotated[Path, typer.Argument(help="JSONL file to write: the same rows with traces. Records lie beside it.")],
    teachers: Annotated[
        Path, typer.Option(help="YAML file: teachers, and any of seed, data, grading (docs/teachers.md).")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Add teachers' traces to a prompt file.

    The same command goes on where it was cut off: a response that is recorded is not asked for again.

    Exit status 65: an input cannot be used; 69: a teacher was given up; 75: stopped by a signal.
    """
    from megatron_dypo.config.reading.load import load_tree
    from megatron_dypo.fs import set_access
    from megatron_dypo.metrics.logs import log_to_terminal
    from megatron_dypo.traces.config import TraceCommandConfig
    from megatron_dypo.traces.report import to_text
    from megatron_dypo.traces.run import generate_traces

    log_to_terminal()
    cfg = load_tree(TraceCommandConfig, teachers, overrides or [])
    set_access(shared=cfg.shared_files)
    report = generate_traces(prompts, out, cfg)
    typer.echo(json.dumps(report, indent=2) if as_json else to_text(report))


def run() -> None:
    """Run the program; print a known error as one line, and exit with its status."""
    from megatron_dypo.ending import Cause, RunEnded

    try:
        typer.run(main)
    except RunEnded as ended:
        print(f"generate_traces: {ended}", file=sys.stderr)
        sys.exit(ended.cause.status)
    except ValueError as error:
        print(f"generate_traces: error: {error}", file=sys.stderr)
        sys.exit(Cause.BAD_INPUT.status)


if __name__ == "__main__":
    run()
