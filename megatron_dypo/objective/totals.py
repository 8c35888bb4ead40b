"""The counts over the global batch that an objective normalises by. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_dypo.types import Sample, SampleKind, Totals


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Three different counts of one replica's groups."""

    prompts: int
    """A group is one prompt, however many members it has."""
    sequences: Mapping[SampleKind, int]
    response_tokens: Mapping[SampleKind, int]


def count_groups(groups: Iterable[Sequence[Sample]]) -> Counts:
    """Count groups, and their members by kind; a kind without members gets zeros."""
    groups = list(groups)
    lengths = {
        kind: [s.num_response_tokens for group in groups for s in group if s.kind is kind] for kind in SampleKind
    }
    return Counts(
        prompts=len(groups),
        sequences={kind: len(of_kind) for kind, of_kind in lengths.items()},
        response_tokens={kind: sum(of_kind) for kind, of_kind in lengths.items()},
    )


def add_counts(counts: Iterable[Counts]) -> Totals:
    """Add up the counts of all replicas."""
    counts = list(counts)
    return Totals(
        num_prompts=sum(replica.prompts for replica in counts),
        num_sequences={kind: sum(replica.sequences[kind] for replica in counts) for kind in SampleKind},
        num_response_tokens={kind: sum(replica.response_tokens[kind] for replica in counts) for kind in SampleKind},
    )
