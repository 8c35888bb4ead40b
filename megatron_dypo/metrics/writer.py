"""Where metrics go: ``metrics.jsonl``, TensorBoard and, when asked, Weights & Biases; and how the step's time is kept.

The names are those of :mod:`megatron_dypo.metrics.names` and those that the objective declares. Any other is
written all the same, and logged as an error, so that the tables stay true.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from megatron_dypo.config.run import LoggingConfig
from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.declared import write_declared
from megatron_dypo.metrics.names import Metric, lookup

log = logging.getLogger("megatron_dypo")

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
WANDB_ID_FILE = "wandb_run_id"


class Sink(Protocol):
    """One destination."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes one record a step to every sink of ``cfg``; a context manager.

    A run that resumes passes ``resume_step``, the first step that it will write: what an earlier attempt wrote for
    that step and later ones is taken back, so that ``metrics.jsonl`` has one line a step. ``config`` is shown by W&B;
    ``declared`` are the objective's own metrics.

        with MetricsWriter(run_dir, cfg.logging, resume_step=step) as writer:
            writer.write(step, {"train/loss": 0.5})
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: LoggingConfig,
        *,
        resume_step: int = 0,
        config: Mapping[str, Any] | None = None,
        declared: Sequence[Metric] = (),
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        # W&B first: it can fail on a missing package, and then nothing has been touched.
        self._sinks: list[Sink] = [_WandbSink(run_dir, cfg.wandb_project, config)] if cfg.wandb else []
        jsonl = _JsonlSink(run_dir / METRICS_FILE, resume_step)
        self._sinks.append(jsonl)
        if cfg.tensorboard:
            self._sinks.append(_TensorBoardSink(run_dir / TENSORBOARD_DIR, resume_step))
        self._last_step = jsonl.last_step
        self._declared, self._checked = declared, set[str]()
        if declared:
            write_declared(run_dir, declared)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the record of ``step``; ValueError for a step that is not after the last one.

        A name that is in no table is written all the same, and said once: a metric's name must not end a run.
        """
        if step <= self._last_step:
            raise ValueError(f"step={step}: must come after the last step written, {self._last_step}")
        for name in metrics:
            self._check_name(name)
        record = {name: float(value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.write(step, record)
        self._last_step = step

    def _check_name(self, name: str) -> None:
        if name in self._checked:
            return
        self._checked.add(name)
        try:
            lookup(name, self._declared)
        except ValueError as error:
            log.error("%s: please report this; it is written all the same", error)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``: ``step``, ``time`` (seconds since the epoch), then the metrics; None if not
    finite.

    A last line that a killed run left unfinished is ignored; ValueError (file, line) for any other bad line.
    """
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from error
    return records


class _JsonlSink:
    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] < resume_step] if path.exists() else []
        self.last_step: int = kept[-1]["step"] if kept else resume_step - 1
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoardSink:
    """TensorBoard's event files."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # brings torch: a command that only reads metrics needs none

        # purge_step tells TensorBoard to forget the points that an earlier attempt wrote from this step on.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
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
    """The W&B id of a run, ``<folder name>-<8 hex digits>``: made once and kept in the run folder."""
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        folder = "".join(c if c.isalnum() and c.isascii() else "-" for c in run_dir.resolve().name)
        replace_file(path, f"{folder[:48]}-{uuid.uuid4().hex[:8]}\n")
    return path.read_text(encoding="utf-8").strip()


class Timings:
    """Seconds that the parts of a step take; parts are disjoint, and all lie within the part named ``step``.

    timings = Timings()
    with timings.measure("step"):
        with timings.measure("gen"):
            ...
    timings.take()  # {"timing_s/gen": …, "timing_s/step": …, "timing_s/other": …, "perf/overhead_ratio": …}
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: str | None = None

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``; ValueError if it is unknown or lies within another part."""
        lookup(f"timing_s/{part}")
        if self._running is not None:
            raise ValueError(f"timing of {part!r} lies within that of {self._running!r}: parts must be disjoint")
        if part != "step":
            self._running = part
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start
            self._running = None

    def take(self) -> dict[str, float]:
        """The metrics since the last call; the counters start again at zero."""
        seconds, self._seconds = self._seconds, {}
        metrics = {f"timing_s/{part}": value for part, value in seconds.items()}
        if "step" in seconds:
            other = max(2 * seconds["step"] - sum(seconds.values()), 0.0)
            metrics["timing_s/other"] = other
            metrics["perf/overhead_ratio"] = other / seconds["step"] if seconds["step"] > 0 else 0.0
        return metrics


_LOSS_TERMS = (
    ("train/pg_loss", "grpo"),
    ("gal/loss", "gal"),
    ("train/sft_loss", "sft"),
    ("train/kl_loss", "kl"),
)


def summary_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line for the terminal; what is missing from ``metrics`` is left out."""
    tiers = "/".join(f"{metrics.get(f'gate/{tier}', 0.0):.0%}" for tier in ("easy", "mid", "hard"))
    terms = " ".join(f"{label} {metrics[name]:.3g}" for name, label in _LOSS_TERMS if name in metrics)
    parts = [
        f"step {step:>4}",
        _part(metrics, "rollout/reward", "reward {:.3f}"),
        f"easy/mid/hard {tiers}" if "gate/easy" in metrics else "",
        _part(metrics, "train/loss", "loss {:.4g}") + (f" ({terms})" if terms else ""),
        _part(metrics, "train/grad_norm", "grad norm {:.3g}"),
        _part(metrics, "train/entropy", "entropy {:.3f}"),
        _part(metrics, "perf/tokens_per_sec", "{:,.0f} tokens/s"),
        _part(metrics, "timing_s/refit", "refit {:.2f} s"),
        _part(metrics, "timing_s/step", "step {:.1f} s"),
    ]
    return " | ".join(part.strip() for part in parts if part.strip())


def _part(metrics: Mapping[str, float], name: str, template: str) -> str:
    return template.format(metrics[name]) if name in metrics else ""
