"""The commands that start ranks (``train``, ``probe``, ``replay``) or are long-lived (``serve``, ``route``)."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_dypo.config.reading.command_line import ConfigFile, Overrides
from megatron_dypo.fs import set_access
from megatron_dypo.launch.attempt import stop_before_start
from megatron_dypo.metrics.status import ATTEMPT_VARIABLE
from megatron_dypo.processes.stop_requests import hold_requests, ignore_requests


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the config and exit.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat notes and missing files as errors.")] = False,
) -> None:
    """Train a model. A run whose folder exists resumes from its last checkpoint.

    The command starts as many local ranks as the layout needs; under torchrun it is one rank. When any of the processes
    gets SIGUSR1, SIGTERM, SIGHUP or Ctrl-C, the ranks finish the step, save a checkpoint and end with status 75; the
    same command resumes. A second Ctrl-C or SIGTERM ends the run at once.

    `run.dir`/status.json says how a run ended; docs/exit_statuses.md lists the exit statuses.
    """
    if not dry_run:
        hold_requests()  # before torch starts threads
        if "RANK" not in os.environ:
            stop_before_start()
    from megatron_dypo.check.inputs import check_inputs
    from megatron_dypo.config.reading.load import dump_config, load_config
    from megatron_dypo.config.smoke import smoke_config
    from megatron_dypo.launch.start import launch, train_rank
    from megatron_dypo.metrics.findings import Findings

    resolved = smoke_config(load_config(config, overrides or []))
    is_checked = ATTEMPT_VARIABLE in os.environ  # by the launcher of this node, which reports each finding once
    found = Findings() if is_checked and not dry_run else check_inputs(resolved)
    if refused := found.refused(dry_run=dry_run, strict=strict):
        raise ValueError("\n".join(refused))
    if dry_run:
        typer.echo(dump_config(resolved), nl=False)
    for note in [*found.missing, *found.notes]:
        typer.echo(f"note: {note}", err=True)
    if not dry_run:
        launch(resolved, ["train", str(config), *(overrides or [])], train_rank)


def probe(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, for its newest checkpoint, or RUN/checkpoints/step_N.")
    ],
    overrides: Overrides = None,
    initial: Annotated[bool, typer.Option("--initial", help="Measure the weights that the run began with.")] = False,
) -> None:
    """Measure the variance and bias of GRPO's, GAL's and the teachers' gradients on the weights of a run.

    Prints which assumptions of the paper hold on these weights, which do not, and which cannot be told. The results are
    RUN/probe/step_N.json and step_N.npz; `megatron-dypo report RUN` shows them. The section `probe` of the config says
    how much is measured; `objective.name=dypo` adds the reference to a run whose objective keeps none.

    The command starts as many local ranks as the layout needs; under torchrun it is one rank. docs/probe.md.
    """
    hold_requests()
    if "RANK" not in os.environ:
        stop_before_start()
    from megatron_dypo.launch.probe_target import probe_target
    from megatron_dypo.launch.start import check_inputs, launch, probe_rank

    target = probe_target(run, initial=initial)
    config = target.config(overrides or [])
    if ATTEMPT_VARIABLE not in os.environ and (missing := check_inputs(config)):
        raise ValueError("\n".join(missing))
    flags = ["--initial"] if initial else []
    launch(config, ["probe", str(run), *flags, *(overrides or [])], functools.partial(probe_rank, target=target))


def replay(
    dump: Annotated[
        Path, typer.Argument(metavar="DUMP", help="RUN/bad_steps/step_N, or the folder of a replica in it.")
    ],
    overrides: Overrides = None,
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint or HF folder, in place of the one that the dump names.")
    ] = None,
) -> None:
    """Run the microbatches of a bad step alone, and report where the first value that is not finite arises.

    A run dumps the microbatches behind an update whose gradients are not finite. The report names weights, inputs of
    the loss, activations by module, log-probs, terms of the loss and gradients, and the samples and tokens. It is
    printed and written to `DUMP/replay/report.json`. docs/troubleshooting.md.

    The command starts as many local ranks as one replica needs; under torchrun it is one rank.
    """
    hold_requests()
    if "RANK" not in os.environ:
        stop_before_start()
    from megatron_dypo.launch.replay_target import replay_target
    from megatron_dypo.launch.start import launch, replay_rank

    target = replay_target(dump, weights=weights)
    config = target.config(overrides or [])
    flags = [] if weights is None else ["--weights", str(weights)]
    launch(config, ["replay", str(dump), *flags, *(overrides or [])], functools.partial(replay_rank, target=target))


def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    first: Annotated[int, typer.Option(min=0, help="Number of this node's first server among all servers.")] = 0,
    log_dir: Annotated[Path, typer.Option(help="Folder for the servers' logs.")] = Path("logs"),
    server_args: Annotated[str, typer.Option(help="More arguments for SGLang, in one text.")] = "",
) -> None:
    """Keep this node's SGLang servers alive for a trainer on other nodes, until SIGTERM.

    `rollout.servers` describes them. The environment variable that it names holds the API key.
    """
    ignore_requests()
    _end_cleanly_on(signal.SIGINT, signal.SIGHUP)
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.config.smoke import smoke_config
    from megatron_dypo.ending import Cause, RunEnded
    from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS, whole_folders
    from megatron_dypo.metrics.logs import log_to_terminal
    from megatron_dypo.parallel.device import device_kind
    from megatron_dypo.rollout.server.node import keep_servers
    from megatron_dypo.rollout.server.process import ServerDiedError

    log_to_terminal()
    resolved = smoke_config(load_config(config, overrides or []))
    set_access(shared=resolved.run.shared_files)
    try:
        keep_servers(
            resolved,
            device=device_kind(),
            first=first,
            log_dir=log_dir,
            server_args=server_args,
            have_worked=bool(whole_folders(Path(resolved.run.dir) / CHECKPOINTS)),
        )
    except (ServerDiedError, TimeoutError) as error:
        raise RunEnded(Cause.SERVERS_GONE, str(error)) from error


def route(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run sglang-router at `rollout.servers.router` for a trainer that names its servers, until SIGTERM.

    The environment variable that `rollout.servers` names holds the API key.
    """
    ignore_requests()
    from megatron_dypo.config.reading.load import load_config
    from megatron_dypo.rollout.server.run_router import run_router

    run_router(load_config(config, overrides or []).rollout)


def _end_cleanly_on(*numbers: signal.Signals) -> None:
    """Let these signals unwind the process, so that it stops its servers. Ignored signals (nohup) stay ignored."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
