"""Render dry runs of the NeMo-Run recipes: ``python -m tests.golden.render_nemo_run`` writes the golden files again."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.support.nemo_run import dypo, nemo_run_python

FOLDER = Path(__file__).parent
DRY_RUNS: dict[str, list[str]] = {
    "nemo_run_qwen2_5_math_7b.txt": ["model=qwen2_5_math_7b", "run.executor.partition=gpu"],
    "nemo_run_llama3_70b.txt": [
        "model=llama3_70b",
        "model.optimizer.lr=5e-7",
        "model.run.dir=/shared/runs/llama3_70b",
        "run.executor.container_image=/shared/dypo.sqsh",
        "run.executor.container_mounts=['/shared:/shared']",
    ],
}
"""Golden file → arguments, without those that make paths the same on every machine."""

_MARGIN = re.compile(r"^(?:\[[\d:]+\] ?| {11})|\s+(?:\w+\.py:\d+)?\s*$", re.MULTILINE)
"""The margins of a line of NeMo-Run's log: a time on the left, a place in its source on the right."""


def render(name: str) -> str:
    """Return the batch script that would be submitted, without times, ids and this machine's paths."""
    where = ["home=/shared/megatron_dypo", "venv=/shared/venv"]
    with tempfile.TemporaryDirectory() as home:
        arguments = ["--dryrun", "run.executor=slurm", *where, *DRY_RUNS[name]]
        done = dypo(nemo_run_python(), Path(home), *arguments)
        _, found, shown = done.stdout.partition("=== APPLICATION ===")
        assert found, done.stdout
        text = "\n".join(_MARGIN.sub("", line) for line in shown.splitlines())
        return re.sub(r"dypo_\d{19}", "dypo_ID", text.replace(home, "NEMORUN_HOME")).strip() + "\n"


if __name__ == "__main__":
    for name in DRY_RUNS:
        (FOLDER / name).write_text(render(name))
