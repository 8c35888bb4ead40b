"""The identity of weights: a digest of each version, by which a resumed run knows weights that it has made again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dypo.parallel.collectives import gather_world
from megatron_dypo.refit.checksums import checksum


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the policy's weights, the same on every rank. Collective over the world.

    It is equal for weights that are equal bit for bit, and different for any others: the two sums of
    :func:`megatron_dypo.refit.checksums.checksum` of every parameter, hashed. Replicas that hold the same weights count
    once. Another tensor, pipeline or expert parallelism gives another digest of the same weights.

    Args:
        named: this rank's parameters.
    """
    own, heads, sums = hashlib.sha256(), list[str](), list[Tensor]()
    for name, value in named:
        heads.append(f"{name} {value.dtype} {tuple(value.shape)}")
        sums.append(checksum(value.contiguous()))
    # One transfer: each would wait for the device.
    for head, found in zip(heads, torch.stack(sums).tolist(), strict=True):
        own.update(f"{head} {found}\n".encode())
    return hashlib.sha256("".join(sorted(set(gather_world(own.hexdigest())))).encode()).hexdigest()[:32]


@dataclass(kw_only=True)
class Weights:
    """The digests of the versions that servers have held; the same on every rank.

    The thread of a rollout stream reads ``known`` while the trainer's thread replaces it.
    """

    digest: Callable[[], str]
    """Returns the digest of the current weights; see :func:`weights_digest`."""
    keeps: int
    """Versions before the newest that stay known."""
    known: Mapping[int, str] = field(default_factory=dict)

    def note(self, version: int) -> None:
        """Learn the digest of the current weights, ``version``, before servers get them. Collective over the world.

        A digest that is known stays: that of a checkpoint was made under the layout of the run that saved it.
        """
        if version not in self.known:
            known = {**self.known, version: self.digest()}
            self.known = {number: found for number, found in known.items() if number >= version - self.keeps}

    def of(self, versions: Iterable[int]) -> dict[int, str] | None:
        """Return the digests of these versions; None if one is not known."""
        known = self.known
        wanted = sorted(set(versions))
        return {version: known[version] for version in wanted} if all(v in known for v in wanted) else None

    def are_mine(self, weights: Mapping[int, str]) -> bool:
        """Return whether this run made the same weights for all of these versions."""
        known = self.known
        return all(known.get(version) == digest for version, digest in weights.items())

    def as_json(self) -> dict[str, str]:
        """Return the digests for a checkpoint."""
        return {str(version): digest for version, digest in self.known.items()}

    def restore(self, stored: Mapping[str, str], step: int) -> None:
        """Go on from the digests of a checkpoint of ``step``."""
        self.known = {int(version): digest for version, digest in stored.items() if int(version) <= step}


class NoWeights:
    """The digests of a run that keeps no journal: there are none."""

    def note(self, version: int) -> None: ...

    def as_json(self) -> dict[str, str]:
        return {}
