"""Measure how the exchange of samples between replicas grows with their number.

    python benchmarks/exchange.py

Each leader holds the same number of samples, 128 of 8,192 tokens with log-probs, and gives them to the replicas that
train on them (:func:`megatron_dypo.batching.exchange.balance`), over gloo.

- ``exchange``: the processor time of one leader, with 2 and with 4 of them. All leaders run on the cores of this
  machine, so its wall clock would say nothing about a cluster.
- ``assignment``: the part that every leader does for the samples of all leaders: it computes who gets which sample. It
  is measured for the 65,536 samples of 64 replicas, and compared with ``bytes``: writing and reading the 1,024 samples
  of one leader, of 8,192 tokens each, which is the part that does not grow.

Every round is printed. The last line is one JSON object, with ratios of medians of the processor time:
``leader_4_vs_2``, one leader's among 4 and among 2; ``assignment_64_vs_bytes``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import measure
import numpy as np
import torch.distributed as dist

from megatron_dypo.batching.exchange import balance, owners
from megatron_dypo.batching.wire import dump_samples, load_samples
from megatron_dypo.types import Sample, SampleKind, Treatment


def make_samples(first: int, count: int, tokens: int) -> list[Sample]:
    """Return ``count`` samples in groups of 8, of ``tokens`` tokens on average."""
    rng = np.random.default_rng(first)
    samples = []
    for index, length in enumerate(rng.integers(tokens // 2, tokens * 3 // 2, count).tolist()):
        sample = Sample(
            order=first + index // 8,
            member=index % 8,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=rng.integers(0, 150_000, length).astype(np.int32),
            num_prompt_tokens=min(200, length // 2),
            policy_version=3,
        )
        sample.rollout_logp = -rng.exponential(size=sample.num_response_tokens).astype(np.float32)
        samples.append(sample)
    return samples


def exchange(count: int, tokens: int, rounds: int) -> None:
    """Run one leader; the first one prints the seconds of all rounds as JSON."""
    dist.init_process_group("gloo")
    samples = make_samples(dist.get_rank() * count, count, tokens)
    took = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.process_time()
        assert dist.group.WORLD is not None
        balance(samples, dist.group.WORLD)
        took.append(time.process_time() - start)
    everyone: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, took[1:])  # the first round connects the ranks
    if dist.get_rank() == 0:
        print(json.dumps([statistics.fmean(one) for one in zip(*everyone, strict=True)]), flush=True)
    dist.destroy_process_group()


def assignment(replicas: int, count: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of both parts of a leader's work, by round."""
    samples = make_samples(0, count, tokens)
    rng = np.random.default_rng(0)
    costs = rng.integers(tokens // 2, tokens * 3 // 2, replicas * count).tolist()
    work = [(number // 8, number % 8, float(cost)) for number, cost in enumerate(costs)]
    variants = {"assignment": lambda: owners(work, replicas), "bytes": lambda: load_samples(dump_samples(samples))}
    return measure.interleaved(variants, rounds)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leader", help=argparse.SUPPRESS, nargs=2, type=int)
    options = parser.parse_args()
    if options.leader is not None:
        count, tokens = options.leader
        exchange(count, tokens, options.rounds)
        return
    measure.print_header()
    count, tokens, rounds = (16, 64, 2) if options.smoke else (128, 8192, options.rounds)
    found = {}
    for ranks in (2, 4):
        given = ["--rounds", str(rounds), "--leader", str(count), str(tokens)]
        found[ranks] = measure.run_ranks(__file__, given, ranks=ranks)
        print(
            f"exchange among {ranks}: {', '.join(f'{1e3 * one:.0f}' for one in found[ranks])} ms a leader", flush=True
        )
    parts = assignment(64, 8 * count, tokens, rounds)
    for name, seconds in parts.items():
        print(f"{name:>10}: {', '.join(f'{1e3 * one:.0f}' for one in seconds)} ms", flush=True)
    measure.print_result(
        {
            "leader_4_vs_2": round(statistics.median(found[4]) / statistics.median(found[2]), 2),
            "assignment_64_vs_bytes": round(
                statistics.median(parts["assignment"]) / statistics.median(parts["bytes"]), 3
            ),
        }
    )


if __name__ == "__main__":
    main()
