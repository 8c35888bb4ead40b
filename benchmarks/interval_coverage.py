"""Measure by simulation how often the 95% intervals of `megatron-dypo compare` contain the truth.

    python benchmarks/interval_coverage.py

Simulated runs answer items. The logit of a response is the sum of the item's difficulty, the run's luck, and a term for
this run and item together, all normal. The truth is the mean accuracy over all runs and items, by quadrature.

Columns: seeds, items, samples of an item, standard deviation of the runs' luck, mean logit; then the coverage of
``ours`` (the intervals of `compare`), of ``resampled`` (a percentile bootstrap that resamples seeds and items) and of
``items`` (a bootstrap over items alone); then the median width of ``ours``. The last line is one JSON object: the
smallest and largest coverage of ``ours`` over the settings with three or more seeds, and over those with two.
"""

from __future__ import annotations

import argparse

import measure
import numpy as np

from megatron_dypo.study.resampling import Array, spread

OF_ITEMS, OF_BOTH = 1.5, 0.5
SETTINGS = [
    # seeds, items, samples, standard deviation of the runs' luck, mean logit
    (2, 100, 4, 0.2, 0.0),
    (3, 30, 32, 0.1, -1.0),
    (3, 30, 32, 0.4, -1.0),
    (3, 100, 4, 0.2, 0.0),
    (3, 500, 1, 0.0, 1.0),
    (3, 500, 1, 0.4, 1.0),
    (5, 200, 4, 0.2, 0.0),
    (8, 200, 4, 0.2, 0.0),
]


def simulate(rng: np.random.Generator, seeds: int, items: int, samples: int, luck: float, logit: float) -> Array:
    """Return the scores [seeds, items] of one comparison."""
    logits = logit + rng.normal(0, luck, (seeds, 1)) + rng.normal(0, OF_ITEMS, (1, items))
    logits = logits + rng.normal(0, OF_BOTH, (seeds, items))
    return np.asarray(rng.binomial(samples, 1 / (1 + np.exp(-logits))) / samples)


def truth(luck: float, logit: float) -> float:
    """Return the mean accuracy over all runs and items."""
    points, weights = np.polynomial.hermite_e.hermegauss(151)
    deviation = np.sqrt(luck**2 + OF_ITEMS**2 + OF_BOTH**2)
    return float((weights / weights.sum() / (1 + np.exp(-(logit + deviation * points)))).sum())


def resampled(rng: np.random.Generator, scores_KI: Array, resamples: int, *, with_seeds: bool) -> tuple[float, float]:
    """Return the percentile interval of a bootstrap over items, and over seeds if asked."""
    seeds, items = scores_KI.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    rows_BI = of_seeds @ scores_KI if with_seeds else np.broadcast_to(scores_KI.mean(axis=0), (resamples, items))
    draws = np.take_along_axis(rows_BI, rng.integers(0, items, (resamples, items)), axis=1).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Simulate every setting and print the coverage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=399)
    parser.add_argument("--smoke", action="store_true", help="a tiny size: does it run?")
    args = parser.parse_args()
    repetitions, settings = (10, SETTINGS[:3]) if args.smoke else (args.repetitions, SETTINGS)
    measure.print_header()
    print("seeds items samples luck logit |  ours resampled items | width")
    found: dict[bool, list[float]] = {True: [], False: []}
    for setting in settings:
        rng, target = np.random.default_rng(1), truth(*setting[3:])
        intervals: dict[str, list[tuple[float, float]]] = {"ours": [], "resampled": [], "items": []}
        for _ in range(repetitions):
            scores = simulate(rng, *setting)
            ours = spread([scores], resamples=args.resamples)
            assert ours.low is not None
            assert ours.high is not None
            intervals["ours"].append((ours.low, ours.high))
            for name, with_seeds in (("resampled", True), ("items", False)):
                intervals[name].append(resampled(rng, scores, args.resamples, with_seeds=with_seeds))
        shares = {
            name: float(np.mean([low <= target <= high for low, high in ends])) for name, ends in intervals.items()
        }
        width = float(np.median([high - low for low, high in intervals["ours"]]))
        shown = " ".join(f"{share:9.3f}" for share in shares.values())
        print(*(f"{value:5}" for value in setting), "|", shown, "|", f"{width:.3f}", flush=True)
        found[setting[0] > 2].append(shares["ours"])
    ends = {
        f"coverage_{what}": [min(found[key]), max(found[key])]
        for key, what in ((True, "3_or_more_seeds"), (False, "2_seeds"))
    }
    measure.print_result(ends)


if __name__ == "__main__":
    main()
