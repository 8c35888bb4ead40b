"""Training from Python: one process, one rank."""

from __future__ import annotations

import os

from megatron_dypo.config.tree import Config


def train_rank(config: Config) -> None:
    """Train until ``run.steps`` optimizer steps are done, then export; this process is one rank of the run.

    It is the only rank, or one of those that torchrun started, which all call this. ``megatron-dypo train`` does the same
    and starts the ranks as well, writes their logs and ends with the exit status of the cause.

    Raises:
        RunEnded: the run ended before that; ``cause`` says why.
        ValueError: an input is missing or breaks a rule, or the layout needs more ranks than there are.
    """
    from megatron_dypo.launch import check_inputs, num_processes

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if "RANK" not in os.environ and num_processes(config) > 1:
        ranks = num_processes(config)
        raise ValueError(f"parallel: needs {ranks} ranks: start them with torchrun --nproc-per-node={ranks}")
    if notes := check_inputs(config):
        raise ValueError("\n".join(notes))
    from megatron_dypo.mcore.features import shield_imports

    shield_imports()  # before anything imports Megatron
    from megatron_dypo.train import train

    train(config)
