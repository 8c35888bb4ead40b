"""Short runs of the quickstart's task: a warm start, DYPO, each transport, and a server that is killed."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_dypo.metrics.records import METRICS_FILE, read_metrics
from megatron_dypo.rollout.server.command import lease_port
from tools.gpu_parts.jobs import JobError, megatron_dypo, run, started, wait, wait_for_line

GAP = "train/train_rollout_logprob_abs_diff"
GAP_BAR = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest mean gap of log-probs between trainer and server, in nats."""
_CONFIG = "examples/quickstart/dypo.yaml"
_KEY = "DYPO_SGLANG_API_KEY"
_PORTS = range(20_000, 30_000)
"""Ports of servers: below those that kernels give to clients, which may take such a port before a server binds it."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Runs of one rank on the first device."""

    work: Path
    """Folder of everything that is made."""
    dtype: str
    num_gpus: int
    """0 on a CPU."""
    warmup_steps: int
    steps: int
    limit_s: float = 600.0
    overrides: tuple[str, ...] = ()
    """Config fields of all runs with servers, as ``field=value``; they win over the check's own."""

    @property
    def task(self) -> Path:
        return self.work / "task"

    @property
    def has_learnt(self) -> bool:
        """Whether the warm start is long enough for right answers. Otherwise every prompt is Hard."""
        return self.warmup_steps >= 900

    @property
    def every_rollout(self) -> str:
        """Return the override by which a run learns from every rollout, so that all log-probs are compared."""
        return f"objective.rl_only_steps={self.steps}"

    def warm_up(self) -> None:
        """Make the task's data and a model that has learnt a part of it, unless they exist."""
        if (self.task / "warmup" / "hf" / "config.json").is_file():
            return
        make = "import sys; sys.path[:0] = ['examples/quickstart', 'examples']; import pathlib, run; "
        make += f"run.make_inputs(pathlib.Path({str(self.task)!r}), 1)"
        run([sys.executable, "-c", make], self.log("data"), self.limit_s)
        overrides = [
            f"run.dir={self.task}/warmup",
            f"run.steps={self.warmup_steps}",
            f"model.hf_path={self.task}/model",
            f"data.prompts=[{self.task}/data/warmup.jsonl]",
            "optimizer.warmup_steps=5",
            *self._one_rank(),
        ]
        run(megatron_dypo("train", "examples/quickstart/warmup.yaml", *overrides), self.log("warmup"), self.limit_s)

    def train(self, name: str, *overrides: str, environment: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Train by DYPO in the folder of this name, and return the records of its steps."""
        run(self.command(name, *overrides), self.log(name), self.limit_s, environment)
        return self.records(name)

    def command(self, name: str, *overrides: str) -> list[str]:
        settings = [
            f"run.dir={self.work}/{name}",
            f"run.steps={self.steps}",
            f"model.hf_path={self.task}/warmup/hf",
            f"data.prompts=[{self.task}/data/train.jsonl]",
            "eval.sets={}",
            "optimizer.warmup_steps=1",
            "rollout.servers.mem_fraction=0.3",
            *([] if self.has_learnt else [self.every_rollout]),
            *self._one_rank(),
            *overrides,
            *self.overrides,
        ]
        return megatron_dypo("train", _CONFIG, *settings)

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return the records of the steps so far, without that of the start."""
        path = self.work / name / METRICS_FILE
        return [dict(record) for record in read_metrics(path) if record["step"] > 0] if path.is_file() else []

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.log"

    def _one_rank(self) -> Sequence[str]:
        return ("parallel.pipeline=1", f"model.dtype={self.dtype}")


def short_quickstart(trainer: Trainer) -> dict[str, Any]:
    """Train by DYPO with a server on the same device, which the run starts."""
    trainer.warm_up()
    records = trainer.train("quickstart", "rollout.servers.base_gpu=0")
    gap = _gap(records)
    return {
        "steps": len(records),
        "logprob_gap": gap,
        "verdicts": {
            f"{trainer.steps} steps": len(records) == trainer.steps,
            f"log-prob gap at most {GAP_BAR[trainer.dtype]:g}": gap is not None and gap <= GAP_BAR[trainer.dtype],
        },
    }


def refit_by_every_transport(trainer: Trainer) -> dict[str, Any]:
    """Refit one server by each transport, and check all bytes. NCCL needs a GPU of its own for each end."""
    trainer.warm_up()
    found: dict[str, Any] = {}
    verdicts = {}
    shared, apart = ["local", "disk"], ["p2p", "broadcast"]
    groups = [(0, shared), (1, apart)] if trainer.num_gpus else [(0, shared + apart)]
    for gpu, transports in groups:
        if trainer.num_gpus and gpu >= trainer.num_gpus:
            found |= {transport: {"skipped": "NCCL needs a second GPU"} for transport in transports}
            continue
        with _server(trainer, gpu) as (url, environment):
            for transport in transports:
                overrides = [f"rollout.servers.urls=[{url}]", f"refit.transport={transport}", "refit.verify=full"]
                overrides.append(trainer.every_rollout)
                records = trainer.train(f"refit_{transport}", *overrides, environment=environment)
                gap = _gap(records)
                seconds = [record["timing_s/refit"] for record in records if "timing_s/refit" in record]
                found[transport] = {"logprob_gap": gap, "refit_s": seconds}
                verdicts[f"{transport}: log-prob gap at most {GAP_BAR[trainer.dtype]:g}"] = (
                    gap is not None and gap <= GAP_BAR[trainer.dtype]
                )
    return {"transports": found, "verdicts": verdicts}


def lose_a_server(trainer: Trainer) -> dict[str, Any]:
    """Kill the only server after the first step; the run starts it again, refits it over new links, and goes on."""
    trainer.warm_up()
    name = "killed_server"
    gpu = 1 if trainer.num_gpus > 1 else 0
    overrides = [f"rollout.servers.base_gpu={gpu}", "refit.transport=p2p", "refit.deadline_s=120"]
    with started(trainer.command(name, *overrides), trainer.log(name)) as process:
        end = time.monotonic() + trainer.limit_s
        while not trainer.records(name):
            if process.poll() is not None or time.monotonic() > end:
                raise JobError(f"no step before the server was to be killed; see {trainer.log(name)}")
            time.sleep(0.2)
        killed = _kill_servers(process.pid)
        wait(process, trainer.log(name), end - time.monotonic())
    records = trainer.records(name)
    return {
        "killed": killed,
        "steps": len(records),
        "verdicts": {"a server was killed": bool(killed), f"{trainer.steps} steps": len(records) == trainer.steps},
    }


def _gap(records: Sequence[Mapping[str, Any]]) -> float | None:
    gaps = [record[GAP] for record in records if record.get(GAP) is not None]
    return max(gaps, default=None)


@contextlib.contextmanager
def _server(trainer: Trainer, gpu: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Start a server on a GPU; yield its URL and the environment with its key."""
    lease = lease_port("127.0.0.1", secrets.choice(_PORTS))
    lease.release()
    port = lease.port
    environment = {_KEY: secrets.token_hex(16)}
    overrides = [
        f"model.hf_path={trainer.task}/warmup/hf",
        f"model.dtype={trainer.dtype}",
        f"rollout.servers.port={port}",
        f"rollout.servers.base_gpu={gpu}",
        "rollout.servers.mem_fraction=0.3",
        *trainer.overrides,
    ]
    command = megatron_dypo("serve", _CONFIG, *overrides, "--log-dir", str(trainer.work / "logs" / f"sglang_{gpu}"))
    log = trainer.log(f"server_{gpu}")
    with started(command, log, environment) as process:
        wait_for_line(process, log, "serving at", trainer.limit_s)
        yield f"http://127.0.0.1:{port}", environment


def _kill_servers(pid: int) -> list[int]:
    """Kill the SGLang schedulers below a process, which hold the weights; return their numbers."""
    killed = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("sglang") or "sglang::scheduler" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)
                killed.append(child.pid)
    return killed
