"""The two tasks of an experiment, trainer and rollout servers, and where each runs."""

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
    """What is to be run."""

    recipe: Recipe
    overrides: list[str]
    """What makes the recipe of its file."""
    home: str
    """The repository, where the job runs."""
    venv: str
    """Environment of trainer and servers, unless they run in a container."""


def local_tasks(job: Job, executor: run.LocalExecutor) -> tuple[list[run.Script], list[run.LocalExecutor]]:
    """Trainer and servers on this machine; NeMo-Run stops one when the other has ended."""
    recipe, servers = job.recipe, job.recipe.rollout.servers
    # Both inherit it; NeMo-Run would write a setting of its own down.
    os.environ.setdefault(servers.api_key_env, secrets.token_hex(16))
    urls = ",".join(f"http://{servers.host}:{servers.port + index}" for index in range(servers.per_node))

    def task(command: str, *arguments: str) -> run.Script:
        args = ["megatron_dypo.cli", command, recipe.file, *job.overrides, *arguments]
        return run.Script(entrypoint=f"{job.venv}/bin/python", path="-m", args=args)

    # torchx kills a task 10 s after its SIGTERM, and SGLang may need that long on its own.
    serve = task("serve", "rollout.servers.stop_grace_s=3", "--log-dir", f"{recipe.run.dir}/logs")
    # The trainer last: NeMo-Run 0.11.1 takes the state of a local group from its last task (schedulers/local.py,
    # describe).
    return [serve, task("train", f"rollout.servers.urls=[{urls}]")], [executor, executor.clone()]


def slurm_tasks(job: Job, executor: run.SlurmExecutor) -> tuple[list[run.Script], list[run.SlurmExecutor]]:
    """Trainer nodes and rollout nodes as one heterogeneous job; when either part ends, NeMo-Run's script ends the
    other.

    Raises:
        ValueError: nodes that the recipe does not know of, no GPUs, or a path that NeMo-Run would change.
    """
    nodes, gpus = executor.nodes, executor.gpus_per_node
    require(nodes == 1, f"run.executor.nodes={nodes}", "set model.trainer_nodes and model.rollout_nodes")
    require(bool(gpus), f"run.executor.gpus_per_node={gpus}", "must be given: nodes are filled by it")
    # NeMo-Run replaces this text wherever it stands in a batch script.
    require("/nemo_run" not in job.home + job.venv, f"home={job.home}, venv={job.venv}", "must not contain /nemo_run")
    trainer, servers = executor.clone(), executor.clone()
    trainer.setup_lines = _setup_lines(job, executor)
    trainer.nodes, servers.nodes = job.recipe.trainer_nodes, job.recipe.rollout_nodes
    for part in (trainer, servers):
        _run_at_home(job.home, part)
    torchrun = f"--nnodes={trainer.nodes} --nproc-per-node={executor.nproc_per_node()} --max-restarts=0"
    torchrun += ' --master-addr="${TRAIN[0]}" --master-port="$DYPO_PORT"'
    train = '-m megatron_dypo.cli train "$CONFIG" "${OVERRIDES[@]}" "$SERVER_URLS"'
    serve = '-m megatron_dypo.cli serve "$CONFIG" "${OVERRIDES[@]}"'
    scripts = [
        _node_script("trainer", f"-m megatron_dypo.launch.torchrun {torchrun} {train}"),
        _node_script("rollout", serve),
    ]
    return scripts, [trainer, servers]


def _setup_lines(job: Job, executor: run.SlurmExecutor) -> str:
    """Settings of slurm/common.sh, as `sbatch slurm/dypo_70b.sh` takes them from the environment, and their users."""
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
    """Have the commands of a part start in the repository and not in NeMo-Run's folder: of two such options the last
    counts."""
    if part.container_image:
        part.container_mounts = [*part.container_mounts, f"{home}:{home}"]
        place = ["--no-container-mount-home", f"--container-workdir={home}"]
    else:
        place = [f"--chdir={home}"]
    part.srun_args = [*(part.srun_args or []), "--overlap", "--cpu-bind=none", *place]


def _node_script(role: str, arguments: str) -> run.Script:
    """slurm/node.sh completes a command with what differs from node to node; the batch script expands the variables."""
    return run.Script(entrypoint="bash", path="slurm/node.sh", args=[role, '"$PYTHON"', arguments])
