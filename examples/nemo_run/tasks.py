"""Make the two tasks of an experiment, trainer and rollout servers, and the executor of each."""

from __future__ import annotations

import os
import secrets
import shlex
from dataclasses import dataclass

import nemo_run as run
from recipes import Recipe

from megatron_dypo.checks import require


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, and where its files are."""

    recipe: Recipe
    overrides: list[str]
    """Overrides that turn the recipe's file into the recipe."""
    home: str
    """Path of the repository on the machines that run the job."""
    venv: str
    """Environment of trainer and servers, unless they run in a container."""


def local_tasks(job: Job, executor: run.LocalExecutor) -> tuple[list[run.Script], list[run.LocalExecutor]]:
    """Make the tasks of trainer and servers on this machine. When one has ended, NeMo-Run stops the other."""
    recipe, servers = job.recipe, job.recipe.rollout.servers
    # Both tasks inherit the key from the environment. NeMo-Run would write its own settings to a file.
    os.environ.setdefault(servers.api_key_env, secrets.token_hex(16))
    urls = ",".join(f"http://{servers.host}:{servers.port + index}" for index in range(servers.per_node))

    def task(command: str, *arguments: str) -> run.Script:
        args = ["megatron_dypo.cli", command, recipe.file, *job.overrides, *arguments]
        return run.Script(entrypoint=f"{job.venv}/bin/python", path="-m", args=args)

    # torchx kills a task 10 s after SIGTERM. Shorten the servers' own grace time, so that they end before that.
    serve = task("serve", "rollout.servers.stop_grace_s=3", "--log-dir", f"{recipe.run.dir}/logs")
    # The trainer must be last: NeMo-Run 0.11.1 takes the state of a local group from its last task
    # (schedulers/local.py, describe).
    return [serve, task("train", f"rollout.servers.urls=[{urls}]")], [executor, executor.clone()]


def slurm_tasks(job: Job, executor: run.SlurmExecutor) -> tuple[list[run.Script], list[run.SlurmExecutor]]:
    """Make the tasks of trainer nodes and rollout nodes in one heterogeneous job.

    When one part ends, NeMo-Run's script ends the other.

    Raises:
        ValueError: ``run.executor.nodes`` is set, there are no GPUs, or NeMo-Run would change a path.
    """
    nodes, gpus = executor.nodes, executor.gpus_per_node
    require(nodes == 1, f"run.executor.nodes={nodes}", "set model.trainer_nodes and model.rollout_nodes")
    require(bool(gpus), f"run.executor.gpus_per_node={gpus}", "must be given: nodes are filled by it")
    # NeMo-Run replaces this text everywhere in a batch script.
    require("/nemo_run" not in job.home + job.venv, f"home={job.home}, venv={job.venv}", "must not contain /nemo_run")
    trainer, servers = executor.clone(), executor.clone()
    trainer.setup_lines = _setup_lines(job, executor)
    trainer.nodes, servers.nodes = job.recipe.trainer_nodes, job.recipe.rollout_nodes
    for part in (trainer, servers):
        _run_at_home(job.home, part)
    torchrun = f"--nnodes={trainer.nodes} --nproc-per-node={executor.nproc_per_node()} --max-restarts=0"
    torchrun += ' --master-addr="$(address "${TRAIN[0]}")" --master-port="$DYPO_PORT"'
    train = '-m megatron_dypo.cli train "$CONFIG" "${OVERRIDES[@]}" "$SERVER_URLS"'
    serve = '-m megatron_dypo.cli serve "$CONFIG" "${OVERRIDES[@]}"'
    scripts = [
        _node_script("trainer", f"-m megatron_dypo.launch.torchrun {torchrun} {train}"),
        _node_script("rollout", serve),
    ]
    return scripts, [trainer, servers]


def _setup_lines(job: Job, executor: run.SlurmExecutor) -> str:
    """Return lines of a batch script that set the settings of slurm/common.sh and source slurm/het_job.sh."""
    settings = {"DYPO_HOME": job.home, "CONFIG": job.recipe.file}
    if executor.container_image:
        settings |= {"IMAGE": executor.container_image, "MOUNTS": ",".join(executor.container_mounts)}
    else:
        settings |= {"VENV": job.venv}
    settings |= {"GPUS_PER_NODE": str(executor.gpus_per_node), "TRAIN_PER_NODE": str(executor.nproc_per_node())}
    lines = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    lines += ["OVERRIDES=(", *(f"    {shlex.quote(override)}" for override in job.overrides), ")"]
    return "\n".join([*lines, 'source "$DYPO_HOME/slurm/het_job.sh"'])


def _run_at_home(home: str, part: run.SlurmExecutor) -> None:
    """Make the commands of a part start in the repository, not in NeMo-Run's folder. The last such option counts."""
    if part.container_image:
        part.container_mounts = [*part.container_mounts, f"{home}:{home}"]
        place = ["--no-container-mount-home", f"--container-workdir={home}"]
    else:
        place = [f"--chdir={home}"]
    part.srun_args = [*(part.srun_args or []), "--overlap", "--cpu-bind=none", *place]


def _node_script(role: str, arguments: str) -> run.Script:
    """Make a task of slurm/node.sh, which adds node-specific arguments. The batch script expands the variables."""
    return run.Script(entrypoint="bash", path="slurm/node.sh", args=[role, '"$PYTHON"', arguments])
