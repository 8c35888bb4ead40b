"""Figures of a set from the verdicts on its responses: avg@n, pass@k and maj@k. Pure arithmetic on counts.

Suffixes: P items (prompts); n responses to an item, of which c are correct.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from megatron_dypo.metrics.intervals import accuracy_interval


@dataclass(frozen=True, kw_only=True)
class Votes:
    """The votes for answers among the responses to one item."""

    correct: int = 0
    """Number of correct responses. They all vote for the right answer, however they write it."""
    wrong: Mapping[str, int] = field(default_factory=dict)
    """Wrong answer → number of responses that give it."""
    abstained: int = 0
    """Number of responses that state no answer; they do not vote."""

    @property
    def total(self) -> int:
        """n: all responses."""
        return self.correct + sum(self.wrong.values()) + self.abstained


def shown_ks(n: int) -> list[int]:
    """Return the values of k for which figures of ``n`` responses are shown: the powers of 2 up to ``n``, and ``n``."""
    return sorted({n, *(2**power for power in range(n.bit_length()) if 2**power <= n)}) if n > 0 else []


def avg_at_n(correct_P: Sequence[int], samples_P: Sequence[int]) -> float | None:
    """Return the share of correct responses; None without responses."""
    return sum(correct_P) / sum(samples_P) if sum(samples_P) else None


def avg_interval(correct_P: Sequence[int], samples_P: Sequence[int]) -> tuple[float, float] | None:
    """Return the 95% interval of :func:`avg_at_n`, with the responses to one item as a cluster; None without any."""
    judged = [(correct, samples) for correct, samples in zip(correct_P, samples_P, strict=True) if samples]
    return accuracy_interval([c for c, _ in judged], [n for _, n in judged]) if judged else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of ``k`` responses is correct.

    1 − C(n−c, k) / C(n, k): the share of all choices of ``k`` of the ``n`` responses that hold a correct one (Chen et
    al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ValueError: not 0 ≤ c ≤ n, or not 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, c={c}, k={k}: must have 0 ≤ c ≤ n and 1 ≤ k ≤ n")
    whole = math.comb(n, k)
    return (whole - math.comb(n - c, k)) / whole  # exact integers, rounded once


def mean_pass_at_k(correct_P: Sequence[int], samples_P: Sequence[int], k: int) -> float | None:
    """Return the mean of :func:`pass_at_k` over the items with at least ``k`` responses; None if no item has them."""
    pairs = zip(samples_P, correct_P, strict=True)
    known = [pass_at_k(n, c, k) for n, c in pairs if n >= k]
    return fmean(known) if known else None


def maj_at_k(votes: Votes, k: int) -> float:
    """Return the chance that the majority of ``k`` of the item's responses is correct.

    It is the exact mean over all choices of ``k`` of the ``n`` responses. The majority is the answer with the most
    votes. If several answers have the most, each is chosen with the same probability. Without any vote there is no
    majority, which counts as not correct.

    Raises:
        ValueError: not 1 ≤ k ≤ n.
    """
    n = votes.total
    if not 1 <= k <= n:
        raise ValueError(f"n={n}, k={k}: must have 1 ≤ k ≤ n")
    # Sum over t, the votes for the right answer. No other answer may have more.
    chances = (math.comb(votes.correct, t) * _unbeaten(votes, k - t, t) for t in range(1, min(votes.correct, k) + 1))
    return math.fsum(chances) / math.comb(n, k)


def _unbeaten(votes: Votes, size: int, t: int) -> float:
    """Sum 1 / (1 + j) over the choices of ``size`` other responses in which no wrong answer has more than ``t`` votes;
    j is the number of wrong answers with exactly ``t`` votes."""
    free = votes.abstained + sum(count for count in votes.wrong.values() if count < t)
    # Number of choices by (responses chosen, ties). Abstentions and rare answers can neither win nor tie.
    ways = {(chosen, 0): math.comb(free, chosen) for chosen in range(min(free, size) + 1)}
    for count in (count for count in votes.wrong.values() if count >= t):
        following: dict[tuple[int, int], int] = {}
        for (chosen, ties), number in ways.items():
            for more in range(min(t, size - chosen) + 1):
                key = (chosen + more, ties + (more == t))
                following[key] = following.get(key, 0) + number * math.comb(count, more)
        ways = following
    return math.fsum(number / (1 + ties) for (chosen, ties), number in ways.items() if chosen == size)


def mean_maj_at_k(votes_P: Sequence[Votes], k: int) -> float | None:
    """Return the mean of :func:`maj_at_k` over the items with at least ``k`` responses; None if no item has them."""
    known = [maj_at_k(votes, k) for votes in votes_P if votes.total >= k]
    return fmean(known) if known else None
