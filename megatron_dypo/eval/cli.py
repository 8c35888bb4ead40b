"""``megatron-dypo eval``."""

from __future__ import annotations

import json
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_dypo.config.reading.command_line import AsJson, Overrides


class ApiName(str, Enum):
    """The APIs of :data:`megatron_dypo.eval.endpoints.Api`."""

    SGLANG = "sglang"
    CHAT = "chat"
    COMPLETIONS = "completions"


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="HF folder, run folder, RUN/checkpoints/step_N, or an endpoint's name."),
    ],
    sets: Annotated[
        Path, typer.Option("--sets", help="YAML file with eval.sets, and any of seed, dtype, data, rollout, grading.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for records, summary.json and report.html.")],
    overrides: Overrides = None,
    url: Annotated[
        list[str] | None,
        typer.Option("--url", help="Server to ask; several share the work.", show_default="servers are started"),
    ] = None,
    api: Annotated[
        ApiName, typer.Option("--api", help="SGLang's own API (token ids), or OpenAI's chat or completions.")
    ] = ApiName.SGLANG,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="HF folder whose tokenizer renders prompts for --api completions.", show_default="sends text"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on evaluation sets: avg@n, pass@k, maj@k, with every response kept.

    The same command goes on where it was cut off: no response that has a record in --out is asked for again.

    Exit status 65: an input cannot be used; 69: no server is left, or none gives a usable response; 12: a set has no
    verdict.
    """
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda received, _: sys.exit(128 + received))  # servers stop, responses are kept
    from megatron_dypo.config.eval_command import EvalCommandConfig
    from megatron_dypo.config.reading.load import load_tree
    from megatron_dypo.eval.run import evaluate_model
    from megatron_dypo.eval.serving import target_of
    from megatron_dypo.fs import set_access
    from megatron_dypo.metrics.logs import log_to_terminal

    log_to_terminal()
    cfg = load_tree(EvalCommandConfig, sets, overrides or [])
    set_access(shared=cfg.shared_files)
    target = target_of(model, cfg, urls=url or (), api=api.value, tokenizer=tokenizer)
    _show(evaluate_model(target, cfg, out), as_json)


def _show(summary: dict[str, Any], as_json: bool) -> None:
    """Print the figures, and exit with a status of its own if a set has no verdict."""
    from megatron_dypo.ending import Cause
    from megatron_dypo.eval.table import to_text

    typer.echo(json.dumps(summary, indent=2) if as_json else to_text(summary))
    if any(figures["avg"] is None for figures in summary["sets"].values()):
        raise typer.Exit(Cause.NO_VERDICTS.status)
