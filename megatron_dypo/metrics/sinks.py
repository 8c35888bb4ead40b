"""The destinations of metrics: ``metrics.jsonl``, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.records import read_metrics

TENSORBOARD_DIR = "tensorboard"
WANDB_ID_FILE = "wandb_run_id"


class Sink(Protocol):
    """One destination."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    def __init__(self, path: Path, resume_step: int) -> None:
        found = read_metrics(path) if path.exists() else []
        kept = [record for record in found if record["step"] < resume_step]
        self.removed = [record for record in found if record["step"] >= resume_step]
        """Records of an earlier attempt for steps that this one makes again."""
        self.last_step: int = kept[-1]["step"] if kept else resume_step - 1
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """TensorBoard's event files."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        # imports torch, which a command that only reads metrics does not need
        from torch.utils.tensorboard import SummaryWriter

        # purge_step tells TensorBoard to forget the points that an earlier attempt wrote from this step on.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any] | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logging.wandb=true: needs W&B: pip install megatron-dypo[wandb]") from error
        self._run = wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=wandb_run_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            config=dict(config or {}),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_run_id(run_dir: Path) -> str:
    """Return the W&B id of a run, ``<folder name>-<8 hex digits>``. It is made once and kept in the run folder."""
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        folder = "".join(c if c.isalnum() and c.isascii() else "-" for c in run_dir.resolve().name)
        replace_file(path, f"{folder[:48]}-{uuid.uuid4().hex[:8]}\n")
    return path.read_text(encoding="utf-8").strip()
