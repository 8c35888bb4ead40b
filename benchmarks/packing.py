"""Compare padding and balance of one update's plan with token-balanced packing, verl's balancing and round robin.

    python benchmarks/packing.py

The data are 1,024 sequences of reasoning lengths (log-normal, median 1,800 tokens, σ = 0.9, clipped to 200–8,192
tokens, of which 150 are prompt) on 8 data-parallel ranks of 2 tensor-parallel ranks. Several draws are planned for each
budget of tokens in a microbatch.

- ``flops``: this package's plan. It balances the ranks by FLOPs, then the microbatches of each rank by FLOPs within the
  budget. Each microbatch has its own length.
- ``tokens``: sequences go to ranks by length, largest first, and to the microbatches of a rank by best-fit decreasing.
- ``verl``: verl's ``balance_batch`` and ``rearrange_micro_batches`` by sequence length: Karmarkar–Karp with the same
  number of sequences on each rank, then Karmarkar–Karp over ⌈tokens/budget⌉ microbatches, which may exceed the budget.
- ``round_robin``: sequence i is on rank i mod 8; microbatches are filled in that order.

Columns, each the worst over the draws:

- ``padding``: share of padding, if each microbatch has its own length; ``padding_fp8``: the same with 8 tensor-parallel
  ranks and FP8 (multiples of 128 tokens); ``padding_equal``: if every microbatch has the length of the fullest.
- ``flops``, ``tokens``: the largest rank divided by the mean, minus 1; ``within``: the same over the microbatches of
  one rank, for the worst rank.
- ``lockstep``: the share of time lost if ranks wait for each other after every microbatch.
- ``fullest``: the fullest microbatch divided by the budget; ``microbatches``: microbatches on a rank; ``ms``: time to
  plan in milliseconds.

The last line is one JSON object: the worst figures of ``flops`` over draws, budgets and architectures.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Callable, Sequence

import measure
import numpy as np

from megatron_dypo.batching.bins import bins_balanced, bins_best_fit
from megatron_dypo.batching.pack import alignment, microbatch_length, num_microbatches, plan_microbatches
from megatron_dypo.models.architecture import Architecture, architecture_from_hf
from megatron_dypo.models.flops import sequence_cost

PROMPT = 150
Plan = list[list[list[int]]]
"""Rank → microbatch → sequences."""

ARCHITECTURES: dict[str, Architecture] = {
    "Qwen2.5-7B": architecture_from_hf(
        {
            "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
            "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
            "max_position_embeddings": 32768,
        },
        where="Qwen2.5-7B",
    ),
    "Qwen3-0.6B": architecture_from_hf(
        {
            "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
        where="Qwen3-0.6B",
    ),
}  # fmt: skip


def draw_lengths(seed: int, count: int) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(np.log(1800), 0.9, count)
    lengths: list[int] = np.clip(drawn, 200, 8192).astype(int).tolist()
    return lengths


def by_flops(lengths: Sequence[int], costs: Sequence[float], ranks: int, budget: int) -> Plan:
    members = bins_balanced(costs, ranks)
    held = [([lengths[i] for i in mine], [costs[i] for i in mine]) for mine in members]
    count = max(num_microbatches(mine, budget=budget, costs=work) for mine, work in held)
    plans = [plan_microbatches(mine, budget=budget, count=count, costs=work) for mine, work in held]
    return [_global(mine, plan) for mine, plan in zip(members, plans, strict=True)]


def by_tokens(lengths: Sequence[int], costs: Sequence[float], ranks: int, budget: int) -> Plan:
    members = bins_balanced(lengths, ranks)
    return _same_count([_global(mine, bins_best_fit([lengths[i] for i in mine], budget)) for mine in members])


def as_verl(lengths: Sequence[int], costs: Sequence[float], ranks: int, budget: int) -> Plan:
    members = karmarkar_karp(lengths, ranks, equal_size=True)
    count = max(-(-sum(lengths[i] for i in mine) // budget) for mine in members)
    return [_global(mine, karmarkar_karp([lengths[i] for i in mine], count)) for mine in members]


def round_robin(lengths: Sequence[int], costs: Sequence[float], ranks: int, budget: int) -> Plan:
    plan: Plan = []
    for rank in range(ranks):
        bins: list[list[int]] = [[]]
        for index in range(rank, len(lengths), ranks):
            if sum(lengths[i] for i in bins[-1]) + lengths[index] > budget:
                bins.append([])
            bins[-1].append(index)
        plan.append(bins)
    return _same_count(plan)


VARIANTS: dict[str, Callable[[Sequence[int], Sequence[float], int, int], Plan]] = {
    "flops": by_flops,
    "tokens": by_tokens,
    "verl": as_verl,
    "round_robin": round_robin,
}


def karmarkar_karp(values: Sequence[int], count: int, *, equal_size: bool = False) -> list[list[int]]:
    """Divide items into ``count`` sets by largest differencing; with ``equal_size`` all sets get the same number."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    step = count if equal_size else 1
    assert len(values) % step == 0, "as many for each set"
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for state, start in enumerate(range(0, len(order), step)):
        sets = [(values[i], [i]) for i in order[start : start + step]] + [(0, [])] * (count - step)
        sets.sort(key=lambda entry: -entry[0])
        heapq.heappush(heap, (sets[-1][0] - sets[0][0], state, sets))
    state = len(heap)
    while len(heap) > 1:
        (_, _, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, x + y) for (a, x), (b, y) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda entry: -entry[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], state, joined))
        state += 1
    return [members for _, members in heap[0][2]]


def _global(members: Sequence[int], bins: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[members[i] for i in b] for b in bins]


def _same_count(plan: Plan) -> Plan:
    count = max(len(bins) for bins in plan)
    return [bins + [[] for _ in range(count - len(bins))] for bins in plan]


def judge(plan: Plan, lengths: Sequence[int], costs: Sequence[float], budget: int) -> dict[str, float]:
    assert sorted(i for bins in plan for members in bins for i in members) == list(range(len(lengths)))
    work_RM = np.array([[sum(costs[i] for i in members) for members in bins] for bins in plan])
    rows_RM, fp8_RM = (
        np.array([[microbatch_length(lengths, [members], multiple) for members in bins] for bins in plan])
        for multiple in (alignment(2, 1), alignment(8, 1, 16))
    )
    tokens_R = np.array([sum(lengths[i] for members in bins for i in members) for bins in plan])
    return {
        "padding": 1 - sum(lengths) / rows_RM.sum(),
        "padding_fp8": 1 - sum(lengths) / fp8_RM.sum(),
        "padding_equal": 1 - sum(lengths) / (rows_RM.max() * rows_RM.size),
        "flops": work_RM.sum(1).max() / work_RM.sum(1).mean() - 1,
        "tokens": tokens_R.max() / tokens_R.mean() - 1,
        "within": (work_RM.max(1) / work_RM.mean(1)).max() - 1,
        "lockstep": work_RM.max(0).sum() / work_RM.mean(0).sum() - 1,
        "fullest": rows_RM.max() / budget,
        "microbatches": rows_RM.shape[1],
    }


def compare(args: argparse.Namespace) -> dict[str, float]:
    worst = {"padding_share": 0.0, "flops_imbalance": 0.0}
    for name, arch in ARCHITECTURES.items():
        cost = sequence_cost(arch)
        for budget in args.budgets:
            print(f"\n{name}, {args.sequences} sequences, {args.ranks} ranks, budget {budget}, {args.draws} draws")
            for variant, make in VARIANTS.items():
                results = []
                for seed in range(args.draws):
                    lengths = draw_lengths(seed, args.sequences)
                    costs = [cost(n, n - PROMPT) for n in lengths]
                    start = time.perf_counter()
                    plan = make(lengths, costs, args.ranks, budget)
                    milliseconds = 1e3 * (time.perf_counter() - start)
                    results.append({**judge(plan, lengths, costs, budget), "ms": milliseconds})
                columns = {key: max(result[key] for result in results) for key in results[0]}
                print(f"{variant:12}", "  ".join(f"{key} {value:.4g}" for key, value in columns.items()))
                if variant == "flops":
                    worst["padding_share"] = max(worst["padding_share"], columns["padding"])
                    worst["flops_imbalance"] = max(worst["flops_imbalance"], columns["flops"])
    return worst


def time_many(sequences: int, ranks: int, budget: int) -> None:
    """Print the seconds to plan a very large update, and the same update on a single rank."""
    lengths = draw_lengths(0, sequences)
    cost = sequence_cost(ARCHITECTURES["Qwen2.5-7B"])
    costs = [cost(n, n - PROMPT) for n in lengths]
    for count in (ranks, 1):
        start = time.perf_counter()
        by_flops(lengths, costs, count, budget)
        print(f"{sequences} sequences planned for {count} rank(s) in {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one draw of a few sequences: does it run?")
    parser.add_argument("--many", type=int, default=100_000, help="sequences of an update that is only planned")
    args = parser.parse_args()
    if args.smoke:
        args.sequences, args.draws, args.many = 64, 1, 500
    measure.print_header()
    result = compare(args)
    print()
    time_many(args.many, 64, args.budgets[0])
    measure.print_result({name: round(value, 6) for name, value in result.items()})


if __name__ == "__main__":
    main()
