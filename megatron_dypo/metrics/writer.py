"""Writing metrics to ``metrics.jsonl``, TensorBoard and optionally Weights & Biases, and measuring the step's time.

Names come from :mod:`megatron_dypo.metrics.names` and from the objective. Any other name is written too, but logged as
an error, so that the tables stay complete.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dypo.config.run import LoggingConfig
from megatron_dypo.metrics.attempts import note_redone
from megatron_dypo.metrics.declared import write_declared
from megatron_dypo.metrics.names import Metric, lookup
from megatron_dypo.metrics.records import METRICS_FILE
from megatron_dypo.metrics.sinks import TENSORBOARD_DIR, JsonlSink, Sink, TensorBoardSink, WandbSink

log = logging.getLogger("megatron_dypo")


class MetricsWriter:
    """Writes one record for each step to every sink of ``cfg``; a context manager.

    A resumed run passes ``resume_step``, the first step that it will write. Records of an earlier attempt for that step
    and later ones are removed, so that ``metrics.jsonl`` has one line for each step. W&B shows ``config``. ``declared``
    are the objective's own metrics.

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
        # W&B first: if its package is missing, nothing has been changed yet.
        self._sinks: list[Sink] = [WandbSink(run_dir, cfg.wandb_project, config)] if cfg.wandb else []
        jsonl = JsonlSink(run_dir / METRICS_FILE, resume_step)
        self._sinks.append(jsonl)
        note_redone(run_dir, jsonl.removed)
        if cfg.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir / TENSORBOARD_DIR, resume_step))
        self._last_step = jsonl.last_step
        self._declared, self._checked = declared, set[str]()
        if declared:
            write_declared(run_dir, declared)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the record of ``step``. ValueError if the step is not after the last one.

        A name that is in no table is written too and logged once, since a metric's name must not end a run.
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
            log.error("%s: please report this; the metric is written anyway", error)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Timings:
    """Seconds that the parts of a step take. Parts are disjoint, and all are inside the part named ``step``.

    timings = Timings()
    with timings.measure("step"):
        with timings.measure("gen"):
            ...
    timings.take()  # {"timing_s/gen": …, "timing_s/step": …, "timing_s/other": …, "perf/overhead_ratio": …, …}
    """

    def __init__(self) -> None:
        self.around: Callable[[str], contextlib.AbstractContextManager[None]] = lambda part: contextlib.nullcontext()
        """Called with the name of each part; the part runs inside what it returns. A profiler sets it."""
        self._seconds: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self._running: str | None = None
        self._clock_lead = _clock_lead()

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``. ValueError if the part is unknown or inside another part."""
        lookup(f"timing_s/{part}")
        if self._running is not None:
            raise ValueError(f"timing of {part!r} lies within that of {self._running!r}: parts must be disjoint")
        if part != "step":
            self._running = part
        with self.around(part):
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start
                self._running = None

    def inside(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return the profiler's range for a piece of a part, which has no time of its own in the metrics."""
        return self.around(name)

    def note(self, metric: str, value: float) -> None:
        """Add a metric of the step to what :meth:`take` returns next."""
        self._noted[metric] = value

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call, and reset the counters."""
        seconds, self._seconds = self._seconds, {}
        noted, self._noted = self._noted, {}
        metrics = noted | {f"timing_s/{part}": value for part, value in seconds.items()}
        if "step" in seconds:
            other = max(2 * seconds["step"] - sum(seconds.values()), 0.0)
            metrics["timing_s/other"] = other
            metrics["perf/overhead_ratio"] = other / seconds["step"] if seconds["step"] > 0 else 0.0
            before, self._clock_lead = self._clock_lead, _clock_lead()
            metrics["perf/clock_step_s"] = self._clock_lead - before
        return metrics


def _clock_lead() -> float:
    """Return by how many seconds the time of day is ahead of the monotonic clock: it changes if the time is set."""
    return time.time() - time.monotonic()


_LOSS_TERMS = (
    ("train/pg_loss", "grpo"),
    ("gal/loss", "gal"),
    ("train/sft_loss", "sft"),
    ("train/kl_loss", "kl"),
)


def summary_line(step: int, metrics: Mapping[str, float]) -> str:
    """Return one line for the terminal. Metrics that are missing are left out."""
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
        _part(metrics, "perf/tokens_per_gpu_per_sec", "{:,.0f} tokens/s/rank"),
        _part(metrics, "perf/mfu", "MFU {:.1%}"),
        _part(metrics, "perf/peak_memory_gib", "{:.1f} GiB"),
        _part(metrics, "perf/exposed_communication_ratio", "exposed communication {:.1%}"),
        _part(metrics, "timing_s/refit", "refit {:.2f} s"),
        _part(metrics, "timing_s/step", "step {:.1f} s"),
    ]
    return " | ".join(part.strip() for part in parts if part.strip())


def _part(metrics: Mapping[str, float], name: str, template: str) -> str:
    return template.format(metrics[name]) if name in metrics else ""
