"""Draw the pictures of README and docs.

python -m tools.pictures                                      # docs/pictures/*.svg from their sources beside them
python -m tools.pictures --run runs/quickstart/dypo           # first take the curves of the report from this run
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.pictures.charts import draw_report, source_of_run
from tools.pictures.diagram import draw_diagram

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
REPORT = FOLDER / "quickstart.json"


def pictures() -> dict[Path, str]:
    """Return each picture's path and content."""
    drawn = {source.with_suffix(".svg"): draw_diagram(source) for source in sorted(FOLDER.glob("*.yaml"))}
    return {**drawn, FOLDER / "report.svg": draw_report(REPORT)}


def main(
    run: Annotated[Path | None, typer.Option(help="Run folder of a quickstart's DYPO run.", show_default=False)] = None,
) -> None:
    """Draw the pictures of README and docs."""
    if run is not None:
        REPORT.write_text(source_of_run(run / "metrics.jsonl"), encoding="utf-8")
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
        typer.echo(f"{path.relative_to(FOLDER.parents[1])}: {len(text):,} characters")


if __name__ == "__main__":
    typer.run(main)
