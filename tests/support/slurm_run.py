"""A tiny run as a job of a test's Slurm: how it is submitted, how far it is, and its processes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import psutil

from megatron_dypo.metrics.records import read_metrics
from tests.slurm_host.host import Job, SlurmHost

DEADLINE_S = 900.0
"""Deadline of a job. It starts and trains in less than a minute, or in several minutes on a busy machine."""


def submit(slurm: SlurmHost, task: Path, folder: Path, *overrides: str, **settings: Any) -> Job:
    """Submit a run of the config ``task``, whose run folder is ``folder/run``.

    Args:
        settings: ``nodes``, ``rollout_nodes``; ``script`` and ``options`` of :meth:`SlurmHost.submit`; environment
            variables of the job.
    """
    script = settings.pop("script", "dypo_70b.sh")
    settings["ROLLOUT_NODES"] = settings.get("ROLLOUT_NODES", str(settings.pop("rollout_nodes")))
    return slurm.submit(folder, script, f"run.dir={folder / 'run'}", *overrides, **{"CONFIG": str(task), **settings})


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics of each step that the run of ``folder`` has made."""
    path = folder / "run" / "metrics.jsonl"
    return {record["step"]: record for record in read_metrics(path) if record["step"]} if path.is_file() else {}


def job_process(job: Job, *words: str) -> psutil.Process:
    """Return a process of a running job that has these words next to each other in its command line."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        starts = range(len(line) - len(words) + 1)
        if line[0:1] == [sys.executable] and any(tuple(line[i : i + len(words)]) == words for i in starts):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if process.environ().get("SLURM_JOB_ID") == job.number:  # other tests run commands at the same time
                    return process
    raise AssertionError(f"no process with {words}\n{job.everything()}")


def rank_process(job: Job, rank: int) -> psutil.Process:
    """Return the process of a rank of a running job."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "megatron_dypo.cli" in line and "train" in line and "torchrun" not in " ".join(line):
            environment = process.environ()
            if environment.get("RANK") == str(rank) and environment.get("SLURM_JOB_ID") == job.number:
                return process
    raise AssertionError(f"no rank {rank}\n{job.everything()}")


def kill_server(job: Job, node: str) -> None:
    """Send SIGKILL to the only server of a node."""
    (server,) = servers(job, node)
    server.kill()


def servers(job: Job, node: str) -> list[psutil.Process]:
    """Return the SGLang processes that a node's log names."""
    log = (job.logs / "latest" / f"rollout.{node}.log").read_text()
    port = log.split(f"http://{node}:")[1].split(",")[0]
    found = [p for p in psutil.process_iter(["cmdline"]) if "sglang_cpu.py" in " ".join(p.info["cmdline"] or [])]
    return [p for p in found if port in p.info["cmdline"] and "processes.guard" not in " ".join(p.info["cmdline"])][:1]
