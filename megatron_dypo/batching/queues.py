"""Where graded groups wait for an update: one queue a treatment, oldest first, each replica its own part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from megatron_dypo.types import Sample, TokenWeights, Treatment

_WEIGHTS = ("advantage", "surrogate", "kl", "nll")
_ARRAYS = ("tokens", "rollout_logp", "old_logp", "ref_logp")


@dataclass(kw_only=True)
class Queues:
    """Groups by treatment; a group is the list of samples that share ``Sample.order``."""

    waiting: dict[Treatment, list[list[Sample]]] = field(
        default_factory=lambda: {Treatment.DISTIL: [], Treatment.REINFORCE: []}
    )

    def put(self, group: list[Sample]) -> None:
        self.waiting[group[0].treatment].append(group)

    def groups(self) -> list[list[Sample]]:
        """All groups, oldest first."""
        return sorted((g for queue in self.waiting.values() for g in queue), key=lambda g: g[0].order)

    def __len__(self) -> int:
        return sum(len(queue) for queue in self.waiting.values())

    def drop_stale(self, version: int, max_staleness: int) -> int:
        """Drop groups that weights of more than ``max_staleness`` versions ago produced; returns how many."""
        before = len(self)
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [g for g in queue if version - g[0].policy_version <= max_staleness]
        return before - len(self)

    def unscored(self) -> list[Sample]:
        """Samples for RL that have no log-probs under π_old yet, oldest first."""
        return [
            s for g in self.groups() for s in g if s.treatment is Treatment.REINFORCE and s.old_logp is None
        ]  # fmt: skip

    def take(self, orders: Iterable[int]) -> list[list[Sample]]:
        """Remove and return the groups with these orders, oldest first; orders that wait elsewhere are ignored."""
        wanted = set(orders)
        taken = [g for g in self.groups() if g[0].order in wanted]
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [g for g in queue if g[0].order not in wanted]
        return taken


def oldest(orders_by_replica: Sequence[Sequence[int]], count: int) -> list[int]:
    """The ``count`` oldest orders over all replicas: first in, first out, whatever the regime."""
    return sorted(order for orders in orders_by_replica for order in orders)[:count]


def dump_samples(samples: Sequence[Sample]) -> bytes:
    """Samples as safetensors bytes: arrays as tensors, scalars as JSON in the header. Weights are included."""
    tensors: dict[str, np.ndarray] = {}
    rows = []
    for index, sample in enumerate(samples):
        for name in _ARRAYS:
            array = getattr(sample, name)
            if array is not None:
                tensors[f"{index}.{name}"] = np.ascontiguousarray(array)
        rows.append(_scalars(sample))
    return safetensors_numpy.save(tensors, metadata={"samples": json.dumps(rows)})


def load_samples(data: bytes) -> list[Sample]:
    """The inverse of :func:`dump_samples`."""
    header_size = int.from_bytes(data[:8], "little")
    rows = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["samples"])
    tensors = safetensors_numpy.load(data)
    return [_sample(row, {n: tensors.get(f"{i}.{n}") for n in _ARRAYS}) for i, row in enumerate(rows)]


def without_arrays(sample: Sample) -> Sample:
    """A copy that carries tokens only, for a forward pass."""
    return replace(sample, rollout_logp=None, old_logp=None, ref_logp=None, weights=None)


def _scalars(sample: Sample) -> dict[str, object]:
    weights = sample.weights
    return {
        "order": sample.order,
        "member": sample.member,
        "treatment": sample.treatment.value,
        "num_prompt_tokens": sample.num_prompt_tokens,
        "policy_version": sample.policy_version,
        "is_correct": sample.is_correct,
        "reward": sample.reward,
        "current_logp_sum": sample.current_logp_sum,
        "weights": None if weights is None else [getattr(weights, name) for name in _WEIGHTS],
    }


def _sample(row: dict[str, Any], arrays: dict[str, Any]) -> Sample:
    weights = row.pop("weights")
    return Sample(
        **{**row, **arrays, "treatment": Treatment(row["treatment"])},
        weights=None if weights is None else TokenWeights(**dict(zip(_WEIGHTS, weights, strict=True))),
    )
