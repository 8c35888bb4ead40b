"""``megatron-dypo probe``: measure the weights of a checkpoint, and train nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.loop.bad_steps.not_finite import require_finite_weights
from megatron_dypo.loop.probe import probe
from megatron_dypo.processes.watchdog import mark


def probe_checkpoint(config: Config, checkpoint: Path | None, run_dir: Path) -> None:
    """Probe the weights of a checkpoint; None: those that ``config`` begins with. This process is one rank.

    Args:
        run_dir: folder of the measured run, for the results.

    Raises:
        RunEnded: on all ranks: see :func:`megatron_dypo.loop.probe.probe`; or a weight is not finite.
    """
    from megatron_dypo.loop.setup.build import open_probe  # imports Megatron, which the loop does not need

    with open_probe(config, checkpoint) as run:
        mark("checking weights")
        require_finite_weights(run.policy, str(checkpoint) if checkpoint else run.start_of_weights)
        run.servers.refit(run.progress.step)
        mark("probing")
        probe(replace(run.prober, run_dir=run_dir), run.progress.step)
