"""Run ``tools/generate_traces.py``: read prompts and records, ask teachers, write traces and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dypo.data.files import require_output
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.eval.endpoints import OpenAIEndpoint
from megatron_dypo.fs import replace_file
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.metrics.progress import progress
from megatron_dypo.traces.asking import Stopped, ask_teachers
from megatron_dypo.traces.client import open_endpoint
from megatron_dypo.traces.config import TeacherConfig, TraceCommandConfig
from megatron_dypo.traces.ledger import Ledger
from megatron_dypo.traces.report import trace_report
from megatron_dypo.traces.tasks import Tasks
from megatron_dypo.traces.write import write_rows

REPORT_FILE = "report.json"
_JUDGED_BY = ("verifier", "by_source", "answer_format", "thinking")

_log = logging.getLogger("megatron_dypo")


def records_folder(out: Path) -> Path:
    """Return the folder with the records and the report of an output file."""
    return out.with_name(f"{out.name}.records")


def generate_traces(prompts: Path, out: Path, cfg: TraceCommandConfig, *, show_progress: bool = True) -> dict[str, Any]:
    """Ask teachers about the prompts of a file, and write its rows with the right responses as traces.

    A response that has a record is not asked for again, so the same call continues one that was cut off. ``out`` and
    the report are written at the end, even if a teacher was given up on the way.

    Returns:
        The report. It is also written to the folder of the records.

    Raises:
        ValueError: an input breaks a rule; a teacher cannot be reached at the start; records are of another setting.
        RunEnded: teachers were given up, or a signal to stop came; the responses before that are recorded.
    """
    require_output(out, prompts, "the prompt file")
    folder = records_folder(out)
    tasks = Tasks(prompts, cfg, cfg.teachers.keys(), show_progress=show_progress)
    with contextlib.ExitStack() as stack:
        stack.callback(tasks.source.close)
        ledgers = {
            name: stack.enter_context(Ledger(folder, name, one, tasks, _setting(cfg, one), show_progress=show_progress))
            for name, one in cfg.teachers.items()
        }
        failures = _ask(tasks, ledgers, cfg, out, stack, show_progress)
        left_out = write_rows(out, tasks, ledgers, show_progress=show_progress)
        report = trace_report(tasks, ledgers, left_out)
        replace_file(folder / REPORT_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if failures:
            lines = [f"teacher {name} was given up: {why}" for name, why in failures.items()]
            raise RunEnded(Cause.SERVERS_GONE, "\n".join([*lines, _so_far(ledgers, out)]))
    return report


def _ask(
    tasks: Tasks,
    ledgers: Mapping[str, Ledger],
    cfg: TraceCommandConfig,
    out: Path,
    stack: contextlib.ExitStack,
    show_progress: bool,
) -> dict[str, str]:
    """Ask for missing responses; return teacher → why it was given up. Teachers with none missing are not contacted."""
    for ledger in ledgers.values():
        if ledger.counts.asked or ledger.num_foreign:
            _log.info(
                "%s: %d responses are recorded and not asked for again, %d more are of prompts that the file lacks",
                *(ledger.name, ledger.counts.asked, ledger.num_foreign),
            )
    needed = [name for name, ledger in ledgers.items() if ledger.num_left]
    if not needed:
        return {}
    endpoints = _reach({name: cfg.teachers[name] for name in needed})
    verifier = stack.enter_context(Verifier(cfg.grading, tasks.verifiers))
    total = sum(ledgers[name].num_left for name in needed)
    with progress(total, "traces", "prompts", enabled=show_progress) as bar:
        try:
            return ask_teachers(tasks, ledgers, endpoints, verifier, seed=cfg.seed, bar=bar)
        except Stopped as error:
            raise RunEnded(Cause.STOPPED, f"stopped by a signal\n{_so_far(ledgers, out)}") from error


def _reach(teachers: Mapping[str, TeacherConfig]) -> dict[str, OpenAIEndpoint]:
    endpoints, problems = {}, []
    for name, one in teachers.items():
        try:
            endpoints[name] = open_endpoint(name, one)
        except ValueError as error:
            problems.append(f"teachers.{name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return endpoints


def _so_far(ledgers: Mapping[str, Ledger], out: Path) -> str:
    count = sum(ledger.counts.asked for ledger in ledgers.values())
    return f"{count} responses are recorded in {records_folder(out)}: start the same command again to go on"


def _setting(cfg: TraceCommandConfig, teacher: TeacherConfig) -> dict[str, Any]:
    """Return all settings that decide the responses of a teacher and their verdicts."""
    grading = dataclasses.asdict(cfg.grading)
    sampling = ("model", "api", "temperature", "top_p", "top_k", "max_tokens")
    return {
        "seed": cfg.seed,
        **{key: getattr(teacher, key) for key in sampling},
        "extra": dict(teacher.extra),
        **{f"grading.{key}": grading[key] for key in _JUDGED_BY},
    }
