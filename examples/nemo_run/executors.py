"""Executors, which say where an experiment runs. Choose one by ``run.executor=NAME``, change it by
``run.executor.option=value``."""

import nemo_run as run


@run.cli.factory
@run.autoconvert
def local() -> run.LocalExecutor:
    """Run on this machine."""
    return run.LocalExecutor()


@run.cli.factory
@run.autoconvert
def slurm() -> run.SlurmExecutor:
    """Run on a Slurm cluster, from one of its login nodes; with pyxis if ``container_image`` is set.

    The recipe sets the number of nodes. Slurm sends SIGUSR1 five minutes before the time limit; the trainer then writes
    a checkpoint.
    """
    return run.SlurmExecutor(
        account="dypo",
        time="04:00:00",
        gpus_per_node=8,
        mem="0",
        exclusive=True,
        signal="USR1@300",
        heterogeneous=True,
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=10,
        poll_estimated_start_time=False,
    )
