"""Queues: graded groups wait for a rollout batch, in one queue for each treatment. Each replica has its own.

A :class:`megatron_dypo.batching.rollout_batch.RolloutBatch` is made of the oldest groups over all replicas.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from safetensors import numpy as safetensors_numpy

from megatron_dypo.types import Sample, TokenWeights, Treatment

_WEIGHTS = ("advantage", "surrogate", "kl", "nll", "anchor")
_ARRAYS = ("tokens", "rollout_logp", "old_logp", "ref_logp")

Group: TypeAlias = "list[Sample]"
"""The samples of one draw of a prompt, which share ``Sample.order`` and ``Sample.treatment``."""


@dataclass(kw_only=True)
class Queues:
    """The groups of one replica that wait, by treatment."""

    waiting: dict[Treatment, list[Group]] = field(
        default_factory=lambda: {Treatment.DISTIL: [], Treatment.REINFORCE: []}
    )

    def put(self, group: Group) -> None:
        """Add a group to the queue of its treatment."""
        self.waiting[group[0].treatment].append(group)

    def groups(self) -> list[Group]:
        """Return all groups, oldest first."""
        return sorted((g for queue in self.waiting.values() for g in queue), key=order_of)

    def __len__(self) -> int:
        return sum(len(queue) for queue in self.waiting.values())

    def orders(self) -> list[int]:
        """Return the orders of all groups, ascending."""
        return sorted(order_of(group) for queue in self.waiting.values() for group in queue)

    def take(self, orders: Collection[int]) -> list[Group]:
        """Remove and return the groups with these orders, oldest first; ignore orders that another replica holds."""
        wanted = set(orders)
        taken = [group for group in self.groups() if order_of(group) in wanted]
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [group for group in queue if order_of(group) not in wanted]
        return taken

    def replace(self, groups: Iterable[Group]) -> None:
        """Put groups in the places of those that have the same orders."""
        by_order = {order_of(group): group for group in groups}
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [by_order.get(order_of(group), group) for group in queue]

    def drop_stale(self, version: int, max_version_lag: int) -> int:
        """Drop groups that weights of more than ``max_version_lag`` versions ago sampled; return how many."""
        before = len(self)
        for treatment, queue in self.waiting.items():
            self.waiting[treatment] = [g for g in queue if version - g[0].policy_version <= max_version_lag]
        return before - len(self)


def order_of(group: Group) -> int:
    """Return the position of a group's draw in the run, by which groups are old or young."""
    return group[0].order


def oldest(orders_by_replica: Iterable[Iterable[int]], count: int) -> list[int]:
    """Return the ``count`` lowest orders over all replicas, ascending: first in, first out, whatever the treatment."""
    return sorted(order for orders in orders_by_replica for order in orders)[:count]


def dump_samples(samples: Sequence[Sample]) -> bytes:
    """Write samples as safetensors bytes: arrays as tensors, scalars as JSON in the header. Weights are included."""
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
    """Read what :func:`dump_samples` wrote."""
    header_size = int.from_bytes(data[:8], "little")
    rows = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["samples"])
    tensors = safetensors_numpy.load(data)
    return [_sample(row, {n: tensors.get(f"{i}.{n}") for n in _ARRAYS}) for i, row in enumerate(rows)]


def without_arrays(sample: Sample) -> Sample:
    """Copy a sample without its arrays but the tokens, for a forward pass."""
    return replace(sample, rollout_logp=None, old_logp=None, ref_logp=None, weights=None)


def _scalars(sample: Sample) -> dict[str, object]:
    weights = sample.weights
    return {
        "order": sample.order,
        "member": sample.member,
        "treatment": sample.treatment.value,
        "num_prompt_tokens": sample.num_prompt_tokens,
        "policy_version": sample.policy_version,
        "logp_version": sample.logp_version,
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
