"""Run DYPO with NeMo-Run: rollout servers and trainer are one experiment.

    python examples/nemo_run/dypo.py model=tiny
    python examples/nemo_run/dypo.py --dryrun run.executor=slurm model=llama3_70b model.optimizer.lr=5e-7

``run.executor`` is ``local`` or ``slurm`` (``executors.py``), and ``model`` is a recipe of ``recipes.py``.
docs/nemo_run.md says more.
"""

import os
import sys

import executors  # noqa: F401 - importing it registers its factories
import nemo_run as run
from recipes import ROOT, Recipe
from tasks import Job, local_tasks, slurm_tasks
from torchx.specs.api import AppState

from megatron_dypo.config.reading.load import load_config


def dypo(ctx: run.cli.RunContext, model: Recipe, home: str = str(ROOT), venv: str = f"{ROOT}/.venv") -> None:
    """Train a model with DYPO.

    Args:
        ctx: NeMo-Run's own options: where and how to run.
        model: a recipe; ``model.section.key=value`` changes any option of the config.
        home: this repository on the machines that run the job.
        venv: Python environment of those machines, not NeMo-Run's; unused with ``run.executor.container_image``.
    """
    job = Job(recipe=model, overrides=model.overrides(), home=home, venv=venv)
    make_tasks = slurm_tasks if isinstance(ctx.executor, run.SlurmExecutor) else local_tasks
    try:
        # Check types and rules of all options now, and not when the job starts.
        load_config(model.file, job.overrides)
        tasks, places = make_tasks(job, ctx.executor)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with run.Experiment(ctx.name) as experiment:
        experiment.add(tasks, executor=places, name="dypo")
        ctx.launch(experiment)
    for part in () if ctx.dryrun or ctx.detach else experiment.jobs:
        if part.state in (AppState.FAILED, AppState.CANCELLED):  # NeMo-Run itself ends with status 0
            sys.exit(f"error: {part.id}: {part.state.name}; logs in {part.executor.job_dir}")


if __name__ == "__main__":
    os.chdir(ROOT)  # relative paths begin here, as for all other commands
    run.cli.main(
        dypo,
        type="experiment",
        default_executor=run.Config(run.LocalExecutor),
        cmd_defaults={"skip_confirmation": True},
    )
