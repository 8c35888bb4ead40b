"""``report.html``: one self-contained page with the plots and samples of a run. It needs no network."""

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
from megatron_dypo.json_text import parse_json
from megatron_dypo.metrics.declared import read_declared
from megatron_dypo.metrics.goodput import measure_goodput
from megatron_dypo.metrics.planned import compare_with_plan, read_planned
from megatron_dypo.metrics.records import METRICS_FILE, read_metrics
from megatron_dypo.metrics.report.plots import Plot, build_plots
from megatron_dypo.metrics.report.probes import probe_part, probe_plots, read_probes
from megatron_dypo.metrics.report.sample_table import select_samples
from megatron_dypo.metrics.report.tiles import build_tiles, duration, goodput_tiles
from megatron_dypo.metrics.versions import VERSIONS_FILE

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
STATUS_FILE = "status.json"


def render_report(run_dir: Path, *, out: Path | None = None, reload_s: int | None = None) -> Path:
    """Write the report of a run, all of it or nothing, and return its path.

    Reads ``metrics.jsonl`` and, where they exist, ``samples/``, ``probe/``, ``summary.json``, ``config.yaml``,
    ``versions.json``, ``planned.json``, ``status.json`` and ``attempts.jsonl``.

    Args:
        out: the page; None: ``run_dir/report.html``.
        reload_s: seconds after which a browser loads the page again; None: it does not.

    Raises:
        ValueError: the folder is not a run's, or one of these files is damaged.
    """
    records, probes = read_records(run_dir), read_probes(run_dir)
    ending, goodput, planned = read_status_text(run_dir), measure_goodput(run_dir), read_planned(run_dir)
    page = render_template(
        "page.html.j2",
        title=run_dir.resolve().name,
        kind="DYPO training report",
        facts=[
            *_facts(records),
            *([f"ended: {ending}"] if ending else []),
            *([f"live: reloads every {reload_s} s"] if reload_s else []),
        ],
        reload_s=reload_s,
        tiles=build_tiles(_read_json(run_dir / SUMMARY_FILE), records) + goodput_tiles(goodput),
        goodput=goodput,
        versions=_read_json(run_dir / VERSIONS_FILE),
        config=_read_text(run_dir / CONFIG_FILE),
        plots=[*build_plots(records, read_declared(run_dir)), *probe_plots(probes)],
        planned=planned,
        compared=compare_with_plan(planned, records) if planned else [],
        probe=probe_part(probes[-1]) if probes else None,
        samples=select_samples(run_dir),
    )
    path = out or run_dir / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return path


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's ``metrics.jsonl``; ValueError if the folder has none."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"run_dir={run_dir}: not a run folder: it has no {METRICS_FILE}")
    return read_metrics(path)


def read_status_text(run_dir: Path) -> str:
    """Return cause and message of a run's end; empty while it goes on."""
    status = _read_json(run_dir / STATUS_FILE)
    return f"{status.get('cause')} ({status.get('message')})" if status.get("state") == "ended" else ""


def render_template(name: str, **values: Any) -> str:
    """Return a page that extends ``base.html.j2``, with Plotly's script in it."""
    nonce = secrets.token_urlsafe(12)
    return _environment().get_template(name).render(**values, nonce=nonce, plotly_js=Markup(get_plotlyjs()))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_dypo.metrics.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = script_json
    environment.filters["duration"] = duration
    environment.filters["figures"] = _figures
    return environment


def script_json(value: Any) -> Markup:
    """Return JSON for the inside of a ``<script>`` element. No text in it can end the element."""
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


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if not text:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value
