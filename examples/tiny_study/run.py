"""Run a study from its plan: inputs, learning rates, final runs, page. After an interruption, the same command goes on.

    python examples/tiny_study/run.py                                      # study.yaml
    python examples/tiny_study/run.py examples/tiny_study/smollm2.yaml     # the confirmation on a pretrained model
    python examples/tiny_study/run.py --budget                             # the arithmetic; nothing runs
    python examples/tiny_study/run.py --page                               # the page of what is done so far

Everything that runs is a command of ``megatron-dypo``. It is printed before it runs, so you can also run it by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))
from whole_job.guarded import ROOT, run_to_the_end
from whole_job.stages import Stages

from megatron_dypo.study.compare import open_comparison
from megatron_dypo.study.missing import reason
from tiny_study.budget import budget_table
from tiny_study.inputs import make_inputs
from tiny_study.kept_server import CLI, kept_server
from tiny_study.page import write_page
from tiny_study.plan import STUDY, Plan, open_plan
from tiny_study.results import collect_results, read_results
from tiny_study.specs import (
    DIVERGED,
    chosen_rates,
    final_spec,
    require_only_diverged,
    results_path,
    tuning_spec,
    write_spec,
)

# A model of this size gains nothing from a second thread, and threads that wait for each other slow down all that runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def compare(plan: Plan, task: str, kind: str, content: dict[str, Any]) -> None:
    """Run the missing cells of a comparison. That a run diverged is a result; any other failure ends this program."""
    path = write_spec(plan, task, kind, content)
    comparison = open_comparison(path)
    is_complete = all((reason(cell) or DIVERGED).startswith(DIVERGED) for cell in comparison.cells)
    words = ["compare", str(path), *(["--table-only"] if is_complete else [])]
    server: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if plan.keep_server and not is_complete:
        arm = next(iter(comparison.spec.methods.values()))
        server = kept_server(plan.config, arm, ROOT / plan.out / "server", plan.server_port)
    print(f"\n$ megatron-dypo {shlex.join(words)}", flush=True)
    with server:
        status = run_to_the_end([*CLI, *words])
    if status:
        _require_diverged(plan, task, kind, status)


def _require_diverged(plan: Plan, task: str, kind: str, status: int) -> None:
    """End this program, unless the only missing runs are those that diverged."""
    path = results_path(plan, task, kind)
    if path.is_file():  # a comparison that was stopped may have none yet
        try:
            require_only_diverged(path, json.loads(path.read_text(encoding="utf-8"))["missing"])
            return
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
    print(f"megatron-dypo compare ended with status {status}; run the same command again to go on", file=sys.stderr)
    sys.exit(status)


def run_study(plan: Plan) -> None:
    """Do everything that is missing of a study, and write its page after each part."""
    stages = Stages(ROOT / plan.out / "stages.json", plan.data_seed)
    for task in plan.tasks:
        make_inputs(Path(plan.out), task, stages, plan.data_seed, plan.warmup_overrides)
        if plan.is_tuned:
            compare(plan, task, "tuning", tuning_spec(plan, task))
        compare(plan, task, "final", final_spec(plan, task, chosen_rates(plan, task)))
        write_page(plan, collect_results(plan))


def main(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan of the study.")] = STUDY,
    budget: Annotated[bool, typer.Option("--budget", help="Show the arithmetic and exit.")] = False,
    page: Annotated[
        bool,
        typer.Option("--page", help="Write the page of what is done, else of the committed results."),
    ] = False,
) -> None:
    """Run a study that was fixed in advance."""
    plan = open_plan(path)
    if budget:
        print(budget_table(plan))
    elif page:
        results = collect_results(plan)
        write_page(plan, results if results["tasks"] else read_results(plan))
    else:
        run_study(plan)


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
