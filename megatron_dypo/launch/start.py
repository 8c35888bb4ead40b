"""From one command to the ranks of a run: check the inputs, then become a rank or start the local ranks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_dypo.config.tree import Config
from megatron_dypo.config.urls import url_host
from megatron_dypo.fs import set_access
from megatron_dypo.launch.probe_target import ProbeTarget
from megatron_dypo.launch.replay_target import ReplayTarget
from megatron_dypo.metrics.terminal import survive_terminal
from megatron_dypo.parallel.environment import prepare_rank, set_kernel_cache
from megatron_dypo.parallel.interfaces import is_loopback, join_network, stay_on_this_host

CHECKED_VARIABLE = "MEGATRON_DYPO_CHECKED"
"""Environment variable of a launcher: the command that became the launcher has checked the inputs."""

log = logging.getLogger(__name__)


def check_inputs(config: Config) -> list[str]:
    """Check everything that is cheap to check; log the notes, and return the missing files.

    Raises:
        ValueError: every input that breaks a rule, each with key, value and rule.
    """
    from megatron_dypo.check.inputs import check_inputs as look  # imports torch, for which --help should not wait

    found = look(config)
    for note in found.notes:
        log.warning("%s", note)
    if found.problems:
        raise ValueError("\n".join(found.problems))
    return found.missing


def launch(config: Config, command: Sequence[str], work: Callable[[Config], None]) -> NoReturn:
    """Run this process as one rank (under torchrun, or if one rank is enough), else start the local ranks.

    The process ends with the status of a :class:`~megatron_dypo.ending.Cause`.

    Args:
        command: of ``megatron-dypo``, with its arguments; the ranks run it again.
        work: the work of one rank.
    """
    set_access(shared=config.run.shared_files)  # a launcher, ranks and their processes inherit it
    survive_terminal()
    prepare_rank(os.environ)
    set_kernel_cache(os.environ)
    if _is_on_one_host(config):
        stay_on_this_host(os.environ)  # ranks and servers inherit it
    else:
        join_network(os.environ)
    if "RANK" not in os.environ and config.parallel.local_ranks > 1:
        _become_local_ranks(config.parallel.local_ranks, command)
    from megatron_dypo.launch.attempt import run_rank

    def prepared(config: Config) -> None:
        from megatron_dypo.mcore.features import shield_imports
        from megatron_dypo.parallel import device
        from megatron_dypo.rollout.descriptors import raise_descriptor_limit

        if not device.on_gpu():
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # it would need a compiler, and takes minutes
        raise_descriptor_limit()  # servers and checkpoint writers inherit it
        shield_imports()  # before anything imports Megatron
        work(config)

    sys.exit(run_rank(config, prepared))


def train_rank(config: Config) -> None:
    """Do the work of one rank of ``megatron-dypo train``."""
    from megatron_dypo.loop.train import train

    train(config)


def probe_rank(config: Config, target: ProbeTarget) -> None:
    """Do the work of one rank of ``megatron-dypo probe``."""
    from megatron_dypo.loop.probe_checkpoint import probe_checkpoint

    probe_checkpoint(config, target.checkpoint, target.run_dir)


def replay_rank(config: Config, target: ReplayTarget) -> None:
    """Do the work of one rank of ``megatron-dypo replay``."""
    from megatron_dypo.loop.bad_steps.replay import replay

    replay(config, target.folder, target.dump, target.weights if target.is_checkpoint else None)


def _is_on_one_host(config: Config) -> bool:
    """Return whether all ranks and all servers with which they make groups are certainly on this host."""
    ranks_are = os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")  # both are unset before torchrun
    return ranks_are and all(is_loopback(url_host(url)) for url in config.rollout.servers.urls)


def _become_local_ranks(count: int, command: Sequence[str]) -> NoReturn:
    """Turn this process into torchrun, which passes signals on to the ranks; pending ones stay pending."""
    torchrun = [sys.executable, "-m", "megatron_dypo.launch.torchrun", "--standalone", f"--nproc-per-node={count}"]
    os.environ[CHECKED_VARIABLE] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [*torchrun, "-m", "megatron_dypo.cli", *command])
