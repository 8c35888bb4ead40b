"""Measure how often the 95% intervals of `megatron-dypo probe` contain the variances of whole gradients.

    python examples/quickstart/run.py
    python benchmarks/probe_coverage.py

The pool is 4 groups of 8 rollouts of each of 1,200 prompts, sampled by the model that the quickstart trained. Its
prompts are the population:

- ``truth``: autograd through transformers' model differentiates L_GRPO and L_GAL of every Mid group. E|g|² − |E g|²
  and what follows from it are sums over these whole gradients.
- ``pool``: the probe's estimate from all prompts, that is from projections to 4,096 numbers of Megatron's scores.
- Trials: each draws 32, 64 or 128 prompts without replacement, and the probe estimates from them. ``held`` is the
  number of intervals that contain the truth, of those that there are. ``many`` is the share in many more trials,
  ``below`` and ``above`` the shares in which the whole interval is below or above the truth, ``width`` the median
  width, relative to the truth.

Rollouts of a group that is not Mid have weight 0 in every gradient, so their scores are left zero. All trials share one
projection. A trial holds the rows and columns of its prompts from the products of the pool, which are those that it
would compute. Drawing 128 of 1,200 without replacement makes the estimates vary by 5% less than the intervals assume.

The last line is one JSON object: ``least_coverage`` is the smallest share of trials over scopes and quantities, for
each number of prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
from numpy.typing import NDArray
from probe_coverage_pool import Folders, draw, save_pool, whole_gradients

from megatron_dypo.probe.gradients import Setting, make_groups
from megatron_dypo.probe.mixing import estimate_moments
from megatron_dypo.probe.moments import Products, Scope, make_products
from megatron_dypo.probe.resample import Estimate
from megatron_dypo.probe.scores import load

ALPHA = 0.5
SCOPES: tuple[Scope, ...] = ("mid", "all")
SETTING = Setting(group_size=8, reference="frozen")
QUICKSTART = measure.ROOT / "examples" / "quickstart"


@dataclass(frozen=True, kw_only=True)
class Size:
    """The numbers of the measurement."""

    prompts: int = 1200
    repeats: int = 4
    new_tokens: int = 40
    trial_prompts: tuple[int, ...] = (32, 64, 128)
    trials: int = 50
    many: int = 2000


SMOKE = Size(prompts=10, repeats=2, new_tokens=6, trial_prompts=(8,), trials=3, many=5)


def truths(variance: dict[str, float]) -> dict[str, float]:
    """Return every quantity from the variances and the covariance of whole gradients."""
    grpo, gal, both = variance["grpo"], variance["gal"], variance["both"]
    return {
        "Var(GRPO)": grpo,
        "Var(GAL)": gal,
        "covariance": both,
        "correlation": both / (grpo * gal) ** 0.5,
        "Var(mix)": ALPHA**2 * grpo + (1 - ALPHA) ** 2 * gal + 2 * ALPHA * (1 - ALPHA) * both,
        "Var(GAL)/Var(GRPO)": gal / grpo,
        "best alpha": min(max((gal - both) / (grpo + gal - 2 * both), 0.0), 1.0),
    }


def estimates(products: Products, scope: Scope) -> dict[str, Estimate]:
    """Return the probe's estimate of every quantity."""
    found: Any = estimate_moments(products, ALPHA, scope)
    return {
        "Var(GRPO)": found["total"]["grpo"],
        "Var(GAL)": found["total"]["gal"],
        "covariance": found["total"]["covariance"],
        "correlation": found["ratios"]["correlation"],
        "Var(mix)": found["mix"]["variance"],
        "Var(GAL)/Var(GRPO)": found["ratios"]["gal_to_grpo"],
        "best alpha": found["mix"]["best_alpha"],
    }


def take(products: Products, kept: NDArray[np.int64]) -> Products:
    """Return the products of some prompts."""
    return Products(
        groups_P=products.groups_P[kept],
        mid_P=products.mid_P[kept],
        mean_PP={pair: product_PP[np.ix_(kept, kept)] for pair, product_PP in products.mean_PP.items()},
        square_P={pair: square_P[kept] for pair, square_P in products.square_P.items()},
    )


def sides(one: Estimate, truth: float) -> tuple[bool, bool, bool]:
    """Return whether the interval contains the truth, is below it, or is above it; three times False without one."""
    if one.low is None or one.high is None:
        return False, False, False
    below, above = one.high < truth, one.low > truth
    return not (below or above), below, above


def run_trials(
    products: Products, truth: dict[Scope, dict[str, float]], size: Size, trial_prompts: int, seed: int
) -> float:
    """Print the table of one number of prompts; return the smallest share of the first ``size.trials`` trials."""
    rng, prompts = np.random.default_rng(seed), len(products.groups_P)
    draws = [np.sort(rng.choice(prompts, trial_prompts, replace=False)) for _ in range(size.trials + size.many)]
    parts = [take(products, kept) for kept in draws]
    informative = [int((part.mid_P > 0).sum()) for part in parts]
    print(f"\ntrials of {trial_prompts} prompts, of which {min(informative)} to {max(informative)} had a Mid group")
    print(f"{'scope':5} {'quantity':18} {'truth':>10} {'pool':>10} |  held none |  many  below  above width")
    shares = []
    for scope in SCOPES:
        found = [estimates(part, scope) for part in parts]
        whole = estimates(products, scope)
        for name, value in truth[scope].items():
            row, share = _row([one[name] for one in found], value, size.trials)
            print(f"{scope:5} {name:18} {value:10.4g} {_text(whole[name].value)} | {row}", flush=True)
            shares.append(share)
    return min(shares)


def _row(found: list[Estimate], truth: float, trials: int) -> tuple[str, float]:
    """Return the columns of the trials, and the share of the first ``trials`` of them."""
    seen = np.array([sides(one, truth) for one in found])
    first, rest = seen[:trials], seen[trials:]
    intervals, held = int(first.sum()), int(first[:, 0].sum())
    many, below, above = rest.sum(axis=0) / max(int(rest.sum()), 1)
    widths = [one.high - one.low for one in found if one.low is not None and one.high is not None]
    width = float(np.median(widths)) / abs(truth) if widths and truth else float("nan")
    row = f"{held:2}/{intervals:2} {trials - intervals:4} | {many:.3f}  {below:.3f}  {above:.3f} {width:5.2f}"
    return row, held / intervals if intervals else 0.0


def _text(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4g'):>10}"


def measured(folders: Folders, size: Size, seed: int, out: Path, *, parity: bool) -> dict[str, dict[int, float]]:
    """Sample, differentiate, score and estimate."""
    clock = [time.monotonic()]
    rollouts = size.repeats * SETTING.group_size
    pool = draw(folders, prompts=size.prompts, rollouts=rollouts, new_tokens=size.new_tokens, seed=seed, parity=parity)
    save_pool(pool, out / "pool.json")
    clock.append(time.monotonic())
    sums = whole_gradients(folders, pool, SETTING.group_size)
    clock.append(time.monotonic())
    accuracy = float(np.mean([one.correct for one in pool]))
    print(f"{len(pool)} prompts, {sums.groups} groups, {sums.mid} of them Mid; accuracy {accuracy:.3f}")
    names = [str(folders.model), str(folders.reference)]
    answer = measure.run_ranks(str(Path(__file__)), ["--score", str(out), *names, "--seed", str(seed)])
    clock.append(time.monotonic())
    scores = load(out / "scores.npz")
    products = make_products(scores, make_groups(scores, SETTING))
    truth = {scope: truths(sums.variances(scope)) for scope in SCOPES}
    least = {count: round(run_trials(products, truth, size, count, seed), 4) for count in size.trial_prompts}
    clock.append(time.monotonic())
    parts = ("rollouts", "whole gradients", "Megatron with its start", "estimates")
    spent = [after - before for before, after in itertools.pairwise(clock)]
    print("\nseconds:", ", ".join(f"{part} {seconds:.0f}" for part, seconds in zip(parts, spent, strict=True)))
    print(f"of Megatron's seconds, {answer['seconds']:.0f} for {answer['scores']} scores")
    return {"least_coverage": least}


def smoke_folders(out: Path) -> Folders:
    """Write two models with random weights, and prompts."""
    sys.path.insert(0, str(QUICKSTART))
    from model import write_model
    from task import draw_problems, write_problems

    folders = Folders(model=out / "model", reference=out / "reference", data=out / "prompts.jsonl")
    for seed, folder in enumerate((folders.model, folders.reference)):
        write_model(folder, seed)
    write_problems(folders.data, draw_problems({1: SMOKE.prompts}, random.Random(0)))
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, help="keep the pool and its scores in this folder")
    parser.add_argument("--seed", type=int, default=0, help="of the rollouts, the projection and the trials")
    parser.add_argument("--smoke", action="store_true", help="a few prompts and random models: does it run?")
    parser.add_argument("--score", nargs=3, metavar=("FOLDER", "MODEL", "REFERENCE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        from probe_coverage_scores import score

        folder, model, reference = args.score
        print(json.dumps(score(Path(folder), model, reference, SETTING.group_size, args.seed)), flush=True)
        return
    measure.print_header()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            folders = smoke_folders(out)
        else:
            model, reference = (args.run / part / "hf" for part in ("dypo", "warmup"))
            folders = Folders(model=model, reference=reference, data=args.run / "data" / "train.jsonl")
        size = SMOKE if args.smoke else Size()
        measure.print_result(measured(folders, size, args.seed, out, parity=args.smoke))


if __name__ == "__main__":
    main()
