"""Fit the constants of ``megatron-dypo plan`` to one half of the published runs, and test them on the other.

    python benchmarks/plan_fit.py

``published_steps.yaml`` has the runs and the rule that halves them. Every constant starts from a guess (``GUESS``) that
counts as one measurement, so that ten constants cannot follow a score of runs wherever noise goes. The script prints
the fitted constants, which ``megatron_dypo/planning/constants.py`` states, each run's error under those *stated*
constants, and the spreads that ``megatron_dypo/planning/intervals.py`` states. Its last line has the errors of the
test half.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict
from statistics import median

import measure
from published_runs import Run, published_runs

from megatron_dypo.planning.constants import FITTED, Constants
from megatron_dypo.planning.fitting import fit_constants
from megatron_dypo.planning.intervals import SPREADS, part_spreads, quantile

GUESS = Constants(
    matmul=1.0,
    expert_matmul=0.6,
    dense_layer_s=1e-3,
    expert_layer_s=4e-3,
    fused_expert_layer_s=2.5e-3,
    hbm=0.7,
    decode_layer_s=5e-5,
    scheduler_s=5e-3,
    request_s=2e-5,
    switch_s=5.0,
    loop_s=3.0,
    refit=0.5,
)
SPREAD = {name: math.log(2) for name in asdict(GUESS) if name != "refit"} | {
    "matmul": math.log(1.1),
    "expert_matmul": math.log(1.3),
    "hbm": math.log(1.2),
}
"""Standard deviations of the guesses' logarithms: a factor of two, and less for shares of data sheets."""
NOISE = {"step": 0.15, "update": 0.09}
"""Standard deviations of errors under the right constants, in the ratio of the bars (25% and 15%)."""


def fit(runs: Iterable[Run]) -> Constants:
    """Return the constants that explain the runs best."""
    runs = list(runs)

    def errors(constants: Constants) -> list[float]:
        return [run.error(constants) / NOISE[run.kind] for run in runs]

    return fit_constants(errors, GUESS, SPREAD)


def error(run: Run) -> float:
    """Return planned / measured − 1 under the stated constants."""
    return math.exp(run.error()) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="fit to three runs of each kind: does it run?")
    args = parser.parse_args()
    measure.print_header()
    runs = published_runs()
    fitted = fit([run for run in runs if run.half == "fit"][:: 6 if args.smoke else 1])
    print(f"\n{'constant':24}{'guess':>12}{'fitted':>12}{'stated':>12}")
    for name in SPREAD:
        print(f"{name:24}" + "".join(f"{getattr(values, name):>12.3g}" for values in (GUESS, fitted, FITTED)))
    print(f"\n{'half':6}{'run':44}{'measured s':>12}{'planned s':>12}{'error':>8}")
    for kind in ("step", "update"):
        for half in ("fit", "test"):
            for run in runs:
                if (run.kind, run.half) == (kind, half):
                    print(f"{half:6}{run.name:44}{run.measured:>12.1f}{run.planned():>12.1f}{error(run):>+8.0%}")
    print("\nspreads (a factor that nine of ten errors are within)   " + "  ".join(
        f"{part} {value:.2f} (stated {SPREADS[part]:.2f})" for part, value in spreads(runs).items()
    ))  # fmt: skip
    result: dict[str, float] = {}
    for kind in ("step", "update"):
        errors = [abs(error(run)) for run in runs if run.half == "test" and run.kind == kind]
        result |= {f"{kind}_median": round(median(errors), 3), f"{kind}_worst": round(max(errors), 3)}
    measure.print_result(result)


def spreads(runs: list[Run]) -> dict[str, float]:
    """Return the factors of ``intervals.SPREADS`` that all runs give."""
    steps = [run for run in runs if run.kind == "step"]
    updates = [run.error() for run in runs if run.kind == "update"]
    return {
        "step": quantile([run.error() for run in steps]),
        "update": quantile(updates),
        "logprobs": quantile(updates),
        **part_spreads([(run.setting, run.measured / run.updates) for run in steps]),
    }


if __name__ == "__main__":
    main()
