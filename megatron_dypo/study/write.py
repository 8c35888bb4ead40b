"""Write the results of a comparison: tables as Markdown and LaTeX, one HTML page, and all figures as JSON.

| path under ``<out>`` | content |
| --- | --- |
| ``tables/<name>.md``, ``tables/<name>.tex`` | each table, and the table of its differences |
| ``comparison.html`` | all tables and plots |
| ``results.json`` | every figure of the tables, unrounded, and the missing cells |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dypo.fs import replace_file
from megatron_dypo.metrics.report.page import render_template
from megatron_dypo.study.cells import Cell
from megatron_dypo.study.formats import to_latex, to_markdown
from megatron_dypo.study.grids import differences_grid, main_grid
from megatron_dypo.study.missing import reason
from megatron_dypo.study.plots import plot_columns
from megatron_dypo.study.results import Result, make_result
from megatron_dypo.study.scores import read_scores
from megatron_dypo.study.spec import Spec


def write_results(spec: Spec, cells: Sequence[Cell], groups: Mapping[str, Sequence[str]]) -> str:
    """Write every table, the page and the figures of the cells that are done; return the tables as Markdown.

    The same cells give the same bytes, except for the page's nonce.

    Raises:
        ValueError: a file of records is damaged.
    """
    out = Path(spec.out)
    missing = [(cell, why) for cell in cells if (why := reason(cell)) is not None]
    scores = read_scores(cells, [name for members in groups.values() for name in members], spec.pass_at)
    results = [make_result(name, spec, groups, scores) for name in spec.tables]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    texts, grids = [], []
    for result in results:
        pair = [main_grid(result, missing, scores, pass_at=spec.pass_at), differences_grid(result)]
        texts.append("\n".join(to_markdown(grid) for grid in pair))
        replace_file(out / "tables" / f"{result.name}.md", texts[-1])
        replace_file(out / "tables" / f"{result.name}.tex", "\n".join(to_latex(grid) for grid in pair))
        grids += pair
    figures = {
        "tables": [_as_json(result) for result in results],
        "missing": {cell.label: why for cell, why in missing},
    }
    replace_file(out / "results.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    page = render_template(
        "study.html.j2",
        title=out.resolve().name,
        kind="Comparison of methods",
        facts=[f"{len(cells) - len(missing)} of {len(cells)} cells", f"baseline {spec.baseline}"],
        reload_s=None,
        grids=grids,
        plots=[plot for result in results for plot in plot_columns(result, scores)],
    )
    replace_file(out / "comparison.html", page)
    return "\n".join(texts)


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "estimates": [
            {"row": arm.label, "column": column, **_flat(one)} for (arm, column), one in result.estimates.items()
        ],
        "differences": [
            {"row": arm.label, "reference": result.references[arm].label, "column": column, **_flat(one)}
            for (arm, column), one in result.differences.items()
        ],
        "best": {column: arm.label for column, arm in result.best.items()},
    }


def _flat(one: Any) -> dict[str, Any]:
    values = dataclasses.asdict(one)
    return {**values.pop("spread"), **values}
