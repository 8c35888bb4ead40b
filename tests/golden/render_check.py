"""Render the output of ``megatron-dypo check`` on a tiny run.

``python -m tests.golden.render_check`` writes ``check_report.txt`` again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_dypo.check.report import to_text
from megatron_dypo.check.survey import survey
from tests.support.check_cases import case

GOLDEN = Path(__file__).parent / "check_report.txt"


def render_check(folder: Path) -> str:
    """Return the report of the case under ``folder``; the text FOLDER stands for that path."""
    config = case(folder, grading={"by_source": {"gsm": "exact"}})
    return to_text(survey(config, show_progress=False)).replace(str(folder), "FOLDER") + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(render_check(Path(temporary)), encoding="utf-8")
