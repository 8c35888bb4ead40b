"""From one command to the ranks of a run: check the inputs, then be a rank or start the local ones."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_dypo.config.tree import Config
from megatron_dypo.ending import RunEnded
from megatron_dypo.processes import end_with_parent

log = logging.getLogger(__name__)


def check_inputs(config: Config) -> list[str]:
    """Look at all that is cheap to look at; return the files that are missing, and log what is only to be noted.

    Raises:
        ValueError: every input that breaks a rule, each with key, value and rule.
    """
    from megatron_dypo.check.inputs import check_inputs as look  # brings torch, which --help need not wait for

    found = look(config)
    for note in found.notes:
        log.warning("%s", note)
    if found.problems:
        raise ValueError("\n".join(found.problems))
    return found.missing


def num_processes(config: Config) -> int:
    """Ranks that the config asks for on this machine."""
    parallel = config.parallel
    stage = math.lcm(parallel.tensor * parallel.context, parallel.expert_ranks)
    return parallel.num_processes or parallel.pipeline * stage


def launch(config: Config, config_path: Path, overrides: Sequence[str]) -> None:
    """Run this process as one rank (under torchrun, or when one is enough), else start the local ranks.

    A run that was asked to stop ends with :data:`~megatron_dypo.preemption.PREEMPTED_STATUS`: its first rank does, so
    that torchrun, which stops all ranks when one fails, lets that one finish first.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if "RANK" not in os.environ and num_processes(config) > 1:
        _become_local_ranks(num_processes(config), config_path, overrides)
    if "RANK" in os.environ:
        end_with_parent()  # a rank whose torchrun was killed is not to train on unseen
    from megatron_dypo.logs import set_up_logging

    set_up_logging(config.run.dir)
    from megatron_dypo.mcore.features import shield_imports

    shield_imports()  # before anything imports Megatron
    from megatron_dypo.train import train

    try:
        train(config)
    except RunEnded as end:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-dypo: {end.cause.label}: {end}", file=sys.stderr)
            sys.exit(end.cause.status)


def _become_local_ranks(count: int, config_path: Path, overrides: Sequence[str]) -> NoReturn:
    """Turn this process into torchrun, so that a signal to it reaches the ranks."""
    torchrun = [sys.executable, "-m", "megatron_dypo.torchrun", "--standalone", f"--nproc-per-node={count}"]
    command = [*torchrun, "-m", "megatron_dypo.cli", "train", str(config_path), *overrides]
    sys.stdout.flush()
    os.execv(sys.executable, command)
