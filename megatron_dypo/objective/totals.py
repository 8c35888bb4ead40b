"""The counts over the global batch that an objective normalises by. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_dypo.types import Sample, Totals, Treatment

_KINDS = (Treatment.DISTILL, Treatment.REINFORCE)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Three different counts of one replica's groups of one treatment."""

    prompts: int = 0
    """A group is one prompt, however many members it has."""
    sequences: int = 0
    response_tokens: int = 0


def count_groups(groups: Iterable[Sequence[Sample]]) -> dict[str, Counts]:
    """Count whole groups by the value of their treatment; a treatment without a group has zeros."""
    groups = list(groups)
    counts = {}
    for kind in _KINDS:
        of_kind = [group for group in groups if group[0].treatment is kind]
        samples = [sample for group in of_kind for sample in group]
        tokens = sum(sample.num_response_tokens for sample in samples)
        counts[kind.value] = Counts(prompts=len(of_kind), sequences=len(samples), response_tokens=tokens)
    return counts


def add_counts(counts: Iterable[dict[str, Counts]]) -> Totals:
    """Add up the counts of all replicas."""
    counts = list(counts)
    return Totals(
        num_prompts=sum(replica[kind.value].prompts for replica in counts for kind in _KINDS),
        num_sequences={kind: sum(replica[kind.value].sequences for replica in counts) for kind in _KINDS},
        num_response_tokens={kind: sum(replica[kind.value].response_tokens for replica in counts) for kind in _KINDS},
    )
