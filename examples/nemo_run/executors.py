"""Where an experiment runs: factories for ``run.executor=NAME``, changed with ``run.executor.option=value``."""

import nemo_run as run


@run.cli.factory
@run.autoconvert
def local() -> run.LocalExecutor:
    """This machine."""
    return run.LocalExecutor()


@run.cli.factory
@run.autoconvert
def slurm() -> run.SlurmExecutor:
    """A Slurm cluster, from one of its login nodes; with pyxis where ``container_image`` is set.

    Nodes come from the recipe. SIGUSR1, five minutes ahead of the time limit, has the trainer write a checkpoint.
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
