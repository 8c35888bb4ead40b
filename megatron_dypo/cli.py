"""The command line: ``megatron-dypo train | serve | route | plan | report | check | export | grade | plan-refit``."""

from __future__ import annotations

import json
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.launch.attempt import stop_before_start
from megatron_dypo.metrics.status import ATTEMPT_VARIABLE
from megatron_dypo.processes.stop_requests import hold_requests, ignore_requests

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Dynamic Policy Optimization for Megatron-Core and SGLang."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the sections of megatron_dypo.config.tree.Config.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve, check, print, stop.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Notes and missing files are errors too.")] = False,
) -> None:
    """Train a model; an existing run folder is resumed.

    Under torchrun this process is one rank; alone it starts the local ranks that the config asks for. On SIGUSR1,
    SIGTERM, SIGHUP or Ctrl-C (to any of the processes) the ranks finish the step, write a checkpoint and end with
    status 75: the same command goes on from there. A second Ctrl-C or SIGTERM ends the run at once.

    `run.dir`/status.json says how a run ended; the exit statuses are in docs/exit_statuses.md.
    """
    if not dry_run:
        hold_requests()  # before torch starts threads
        if "RANK" not in os.environ:
            stop_before_start()
    from megatron_dypo.check.inputs import check_inputs
    from megatron_dypo.config.load import dump_config, load_config
    from megatron_dypo.launch.start import launch
    from megatron_dypo.metrics.findings import Findings

    resolved = load_config(config, overrides or [])
    is_checked = ATTEMPT_VARIABLE in os.environ  # by the launcher of this node, which says what is wrong once
    found = Findings() if is_checked and not dry_run else check_inputs(resolved)
    if refused := found.refused(dry_run=dry_run, strict=strict):
        raise ValueError("\n".join(refused))
    if dry_run:
        typer.echo(dump_config(resolved), nl=False)
    for note in [*found.missing, *found.notes]:
        typer.echo(f"note: {note}", err=True)
    if dry_run:
        return
    launch(resolved, config, overrides or [])


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="The trainer's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of this node's first server among all.")] = 0,
    log_dir: Annotated[Path, typer.Option(help="Where each server has its log.")] = Path("logs"),
    engine_args: Annotated[str, typer.Option(help="More arguments for SGLang, in one string.")] = "",
) -> None:
    """Keep this node's SGLang servers alive for a trainer on other nodes, until SIGTERM.

    They are what `rollout.servers` describes. The API key comes from the environment variable that it names.
    """
    ignore_requests()
    _end_cleanly_on(signal.SIGINT, signal.SIGHUP)
    from megatron_dypo.config.load import load_config
    from megatron_dypo.ending import Cause, RunEnded
    from megatron_dypo.metrics.logs import log_to_terminal
    from megatron_dypo.parallel.device import device_kind
    from megatron_dypo.rollout.server.node import keep_servers
    from megatron_dypo.rollout.server.process import ServerDiedError

    log_to_terminal()
    try:
        keep_servers(
            load_config(config, overrides or []),
            device=device_kind(),
            first=first,
            log_dir=log_dir,
            engine_args=engine_args,
        )
    except (ServerDiedError, TimeoutError) as error:
        raise RunEnded(Cause.SERVERS_GONE, str(error)) from error


@app.command()
def route(
    config: Annotated[Path, typer.Argument(help="The trainer's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
) -> None:
    """Run the router at `rollout.servers.router`, for a trainer that names its servers, until SIGTERM.

    It is sglang-router. The API key comes from the environment variable that `rollout.servers` names.
    """
    ignore_requests()
    from megatron_dypo.config.load import load_config
    from megatron_dypo.rollout.server.run_router import run_router

    run_router(load_config(config, overrides or []).rollout)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file, as for train.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    gpu: Annotated[str, typer.Option(help="A row of megatron_dypo.planning.devices.")] = "h100-80gb",
    nodes: Annotated[int | None, typer.Option(min=1, help="Of the trainer; default: what the config asks for.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean prompt; default: a quarter of the limit.")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean response; default: a quarter of the limit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes and seconds.")] = False,
) -> None:
    """Say without a GPU whether a run fits, what a step takes, and how to divide the GPUs.

    Exit code 1: it does not fit, or the GPU cannot run it.
    """
    from megatron_dypo.config.load import load_config
    from megatron_dypo.planning.devices import find_gpu
    from megatron_dypo.planning.plan import as_data, make_plan
    from megatron_dypo.planning.report import render
    from megatron_dypo.planning.setting import make_setting

    setting = make_setting(
        load_config(config, overrides or []),
        find_gpu(gpu),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
    )
    made = make_plan(setting)
    typer.echo(json.dumps(as_data(made), indent=2) if as_json else render(made).rstrip("\n"))
    if made.problems():
        raise typer.Exit(1)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of `megatron-dypo train`.")],
) -> None:
    """Write RUN_DIR/report.html: one self-contained page of plots and samples."""
    from megatron_dypo.metrics.report.page import render_report

    typer.echo(render_report(run_dir))


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="YAML file, as for train.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    judge_all: Annotated[bool, typer.Option("--all", help="Judge every trace, not 200 of each teacher.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check all that a run reads: rows, lengths, first prompt, tokenizer, teachers' traces, verifiers, contamination.

    Nothing is trained and no server is started. Exit status 65: `train` would refuse to start.
    """
    from megatron_dypo.check.report import to_data, to_text
    from megatron_dypo.check.survey import survey
    from megatron_dypo.config.load import load_config
    from megatron_dypo.ending import Cause

    try:
        resolved = load_config(config, overrides or [])
    except ValueError as error:
        typer.echo(f"megatron-dypo: error: {error}", err=True)
        raise typer.Exit(Cause.BAD_INPUT.status) from error
    found = survey(resolved, judge_all=judge_all)
    typer.echo(json.dumps(to_data(found), indent=2) if as_json else to_text(found))
    if found.problems:
        raise typer.Exit(Cause.BAD_INPUT.status)


@app.command()
def grade(
    file: Annotated[Path, typer.Argument(help="JSONL or Parquet file, a row for each response.")],
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a verifier over a file of responses, in the same processes as in a run, and count its verdicts.

    Exit status 65: the file, a row of it or the verifier cannot be used; 12: no response got a verdict.
    """
    from megatron_dypo.config.grading import GradingConfig
    from megatron_dypo.ending import Cause
    from megatron_dypo.grading.command import grade_file, to_data, to_text
    from megatron_dypo.grading.pair_file import Fields

    try:
        cfg = GradingConfig(verifier=verifier, workers=workers, deadline_s=deadline_s)
        fields = Fields(
            response=field_response,
            answer=field_answer,
            expected=expected or "expected",
            needs_expected=expected is not None,
        )
        summary = grade_file(cfg, file, fields, show=show)
    except ValueError as error:
        typer.echo(f"megatron-dypo: error: {error}", err=True)
        raise typer.Exit(Cause.BAD_INPUT.status) from error
    typer.echo(json.dumps(to_data(summary), indent=2) if as_json else to_text(summary))
    if summary.no_verdict == summary.rows:
        raise typer.Exit(Cause.NO_VERDICTS.status)


class _Quantization(str, Enum):
    NONE = "none"
    BLOCK = "fp8_block"
    CHANNEL = "fp8_channel"


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of `megatron-dypo train`.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint.", show_default="the newest whole one")] = None,
    out: Annotated[
        Path | None, typer.Option(help="HF folder to create.", show_default="RUN_DIR/exports/step_<step>")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an HF folder that is there.")] = False,
    quantize: Annotated[_Quantization, typer.Option(help="FP8 for the layers' linear weights.")] = _Quantization.NONE,
) -> None:
    """Write the policy of a checkpoint as an HF folder that transformers and SGLang load.

    Its bytes are those of the run's own export of that step. Needs no GPU and none of the run's ranks.
    """
    from megatron_dypo.metrics.logs import log_to_terminal
    from megatron_dypo.models.export_run import export_run

    log_to_terminal()
    typer.echo(export_run(run_dir, step=step, out_dir=out, overwrite=overwrite, quantization=quantize.value))


@app.command("plan-refit")
def plan_refit(
    config: Annotated[Path, typer.Argument(help="YAML file as of `train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    bandwidth_gbs: Annotated[float, typer.Option(help="GB/s that a rank sends and receives at.")] = 50.0,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Trainer ranks.", show_default="as `train` starts")
    ] = None,
    ep_size: Annotated[
        int | None, typer.Option(min=1, help="SGLang's --ep-size.", show_default="extra_args, or 1")
    ] = None,
    quantization: Annotated[
        _Quantization, typer.Option(help="Type that linear weights travel in.")
    ] = _Quantization.NONE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every rank, every link.")] = False,
) -> None:
    """Say what a push of weights moves: bytes of ranks and links, the limit, the time that the plan's order gives.

    Reads the config and MODEL/config.json; needs neither weights nor servers.
    """
    from megatron_dypo.config.load import load_config
    from megatron_dypo.planning.refit import RefitOptions, plan_of_config, refusal_of_training
    from megatron_dypo.refit.plan.summary import summarize, to_json, to_text

    resolved = load_config(config, overrides or [])
    options = RefitOptions(
        world_size=world_size,
        ep_size=ep_size,
        quantization=quantization.value,
    )
    plan = plan_of_config(resolved, options)
    summary = summarize(plan, bandwidth_gbs * 1e9)
    typer.echo(json.dumps(to_json(summary)) if as_json else to_text(plan, summary))
    if refusal := refusal_of_training(resolved):
        typer.echo(f"note: `train` refuses this layout: {refusal}", err=True)


def _end_cleanly_on(*numbers: signal.Signals) -> None:
    """Have these signals unwind the process, so that it stops its servers; one that is ignored (nohup) stays so."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def main() -> None:
    """Entry point: the user's errors are one line, without a traceback; the exit status tells the cause."""
    try:
        app()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 (every end of the command passes here, and is told)
        from megatron_dypo.launch.attempt import end_of

        sys.exit(end_of(error))


if __name__ == "__main__":
    main()
