"""``report.html``: one self-contained page of a run's plots and samples, that works without a network."""

from __future__ import annotations

import json
import secrets
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.declared import read_declared
from megatron_dypo.metrics.report.plots import Plot, build_plots
from megatron_dypo.metrics.report.sample_table import select_samples
from megatron_dypo.metrics.report.tiles import build_tiles, duration
from megatron_dypo.metrics.versions import VERSIONS_FILE
from megatron_dypo.metrics.writer import METRICS_FILE, read_metrics

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
STATUS_FILE = "status.json"


def render_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html``, all of it or nothing, and return its path.

    Reads ``metrics.jsonl`` and, where there are any, ``samples/``, ``summary.json``, ``config.yaml`` and
    ``versions.json``. ValueError if the folder is not a run's, or one of these files is damaged.
    """
    metrics_path = run_dir / METRICS_FILE
    if not metrics_path.is_file():
        raise ValueError(f"run_dir={run_dir}: not a run folder: it has no {METRICS_FILE}")
    records = read_metrics(metrics_path)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=run_dir.resolve().name,
            facts=_facts(records) + _ending(_read_json(run_dir / STATUS_FILE)),
            tiles=build_tiles(_read_json(run_dir / SUMMARY_FILE), records),
            versions=_read_json(run_dir / VERSIONS_FILE),
            config=_read_text(run_dir / CONFIG_FILE),
            plots=build_plots(records, read_declared(run_dir)),
            samples=select_samples(run_dir),
            nonce=secrets.token_urlsafe(12),
            plotly_js=Markup(get_plotlyjs()),
        )
    )
    path = run_dir / REPORT_FILE
    replace_file(path, page)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_dypo.metrics.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = script_json
    environment.filters["figures"] = _figures
    return environment


def script_json(value: Any) -> Markup:
    """JSON for the inside of a ``<script>`` element: no text in it, however hostile, can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _figures(plots: list[Plot]) -> list[Any]:
    return [json.loads(plot.figure.to_json()) for plot in plots]


def _facts(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return ["no step written yet"]
    facts = [f"{len(records):,} steps ({records[0]['step']}–{records[-1]['step']})"]
    times = [record["time"] for record in records if record.get("time") is not None]
    if times:
        facts.append(f"{duration(times[-1] - times[0])} from the first record to the last")
        facts.append(f"last record {datetime.fromtimestamp(times[-1], tz=timezone.utc):%Y-%m-%d %H:%M} UTC")
    return facts


def _ending(status: dict[str, Any]) -> list[str]:
    """How the run ended, if ``status.json`` says that it did."""
    if status.get("state") != "ended":
        return []
    return [f"ended: {status.get('cause')} ({status.get('message')})"]


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value
